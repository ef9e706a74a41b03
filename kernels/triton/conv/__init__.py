"""What `task_conv2d`, `norm_moments` and `norm_act_pool` have in common: pixels, and how they are found."""
