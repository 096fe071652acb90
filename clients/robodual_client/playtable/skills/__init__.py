"""The expert's skills: generators of goals for the gripper, one a control step, that read the view as it changes."""
