"""The ground floor: files read and written safely, progress, sizes, text for people."""
