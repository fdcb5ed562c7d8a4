"""Side by side with the peers: README.md says what each benchmark is and how to run it."""
