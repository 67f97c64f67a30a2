"""Networks: no loss, no noise, nothing that knows how they are trained."""
