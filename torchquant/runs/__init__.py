"""Runs that write into a folder: the commands of `torchquant`, as functions, and what they share."""
