"""The engine of `dropless` and `capacity`: choices sorted by expert."""
