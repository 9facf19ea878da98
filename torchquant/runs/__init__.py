"""Runs that write into a folder: the commands of `torchquant` as functions, and the code that they share."""
