"""Finding and reading the files of a data set, one module per layout."""
