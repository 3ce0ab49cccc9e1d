"""What people see: the report, the live view, tables of devices, and numbers in words."""
