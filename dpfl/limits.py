"""The clip norms and noise multipliers that make sense, wherever they are given."""

SMALLEST_CLIP_NORM, LARGEST_CLIP_NORM = 1e-9, 1e9  # beyond, squares leave the range of float32
LEAST_NOISE, LARGEST_NOISE = 0.01, 1e9  # with less, nobody is protected
