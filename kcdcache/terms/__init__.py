"""What each distillation method adds to a student's loss: one file per family."""
