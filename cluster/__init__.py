"""How Rayward meets its cluster: configuration, sessions, training, generation, tracking. Knows no paper."""
