# The same with make, several checkpoints side by side: make -f refactor.mk MODELS=models OUT=out [OPTIONS='--workers 1'] -j 2
# Statistics are made once and kept: other options of the refactoring do not read the text again.
MODELS ?= models
OUT ?= out
STATS ?= stats
TEXT ?=
OPTIONS ?=
REQUIRE ?= recovered@50%>=0
NAMES := $(notdir $(patsubst %/,%,$(wildcard $(MODELS)/*/)))

all: $(NAMES:%=$(OUT)/%/evaluation.json)

$(STATS)/%/index.json: $(MODELS)/%/config.json | $(STATS)
	prism-profile $(MODELS)/$* $(STATS)/$* --resume --quiet $(TEXT)

$(OUT)/%/prism.json: $(STATS)/%/index.json | $(OUT)
	prism-refactor $(MODELS)/$* $(OUT)/$* --stats $(STATS)/$* --resume --quiet $(OPTIONS)

$(OUT)/%/evaluation.json: $(OUT)/%/prism.json
	prism-verify $(MODELS)/$* $(OUT)/$* --quiet
	prism-eval $(MODELS)/$* $(OUT)/$* --save --quiet --num-tokens 4000 --require '$(REQUIRE)'

$(STATS) $(OUT):
	mkdir -p $@

# A measurement that does not meet REQUIRE is made again.
.DELETE_ON_ERROR:
.PRECIOUS: $(STATS)/%/index.json $(OUT)/%/prism.json
.PHONY: all
