"""The two ways a job can end badly."""


class UserError(Exception):
    """A mistake its author can mend: one sentence naming the value, the place and the remedy. Exit status 2."""


class JobFailure(Exception):
    """A failure of the job itself, told as its root cause in one sentence. Exit status 1."""
