"""What public scripts do, a test for each habit; docs/public-scripts.md names the scripts."""
