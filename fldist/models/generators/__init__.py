"""Image generators, one family a file: from noise and labels to images."""
