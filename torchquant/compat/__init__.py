"""Other libraries' words for what is here: code written against them runs with its import changed."""
