"""What the compiler decides and how far its results are from others: `explain`, `compare`, `gradient_noise`."""
