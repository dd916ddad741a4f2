"""Speed, as ratios to named peers in the same process."""
