"""What makes the method fast, lean and hard to kill; none of it is needed to understand it."""
