"""What a step costs, measured on the device at hand."""
