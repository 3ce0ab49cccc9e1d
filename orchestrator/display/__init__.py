"""What people see: the report, the live view, the words for both."""
