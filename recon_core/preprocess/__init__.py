"""What happens to k-space before a method sees it."""
