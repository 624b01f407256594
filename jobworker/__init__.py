"""The parts of jobworker's server and worker that have a room of their own."""

VERSION = "1.1.0"
