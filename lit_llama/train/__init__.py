"""What a finetune script calls: the loss of a step (loss.py), the schedule (schedule.py), a run's folder (run.py)."""
