"""What expo_fast is measured with; started from the root of a checkout."""
