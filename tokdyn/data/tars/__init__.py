"""Read tar files of samples, as WebDataset writes them, in any order."""
