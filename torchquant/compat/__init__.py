"""The APIs of other libraries: code written against them runs with its imports changed."""
