"""What is added to a pre-trained network and, where that is exact, folded into it again."""
