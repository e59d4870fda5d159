"""The stages: data, trainers, encoding, sampling, scoring, and the command line."""
