"""What each verb does: a verb is a file."""
