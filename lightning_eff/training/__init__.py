"""What the callbacks and strategies share around Lightning's Trainer."""
