"""What two or more methods share around Lightning's Trainer."""
