"""What is in the files that the commands write and read."""

MANIFEST = "prism.json"


# What prism-eval --save adds to a refactored checkpoint.
EVALUATION = "evaluation.json"
