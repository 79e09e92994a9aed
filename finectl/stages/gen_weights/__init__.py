"""The steps of `finectl gen-weights`, one file a step (Gong et al., ECCV 2024, arXiv 2407.11966)."""
