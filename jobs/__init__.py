"""The jobs: one package a paper, and what several papers share."""
