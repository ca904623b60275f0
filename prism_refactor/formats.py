"""What is in the files that the commands write and read."""

MANIFEST = "prism.json"


# Of a statistics folder.
INDEX = "index.json"
# What prism-eval --save adds to a refactored checkpoint.
EVALUATION = "evaluation.json"
# What prism-report writes.
PAGE = "report.html"
# Co-activation of some neurons of every layer, for prism-report.
PICTURE_FILE = "coactivation.safetensors"
# The model card.
CARD = "README.md"
