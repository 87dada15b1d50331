"""What happens to s and the full model's weights before the first round: importance, stand-ins, scale."""
