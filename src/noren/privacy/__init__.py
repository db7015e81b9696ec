"""What leaves a party: guards, and the record of what was released."""
