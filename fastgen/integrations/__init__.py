"""Drop-ins for other libraries: one module each, imported by those who have that library."""
