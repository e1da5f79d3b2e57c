# SPDX-License-Identifier: Apache-2.0
"""The mutants of what users touch: Hugging Face's models, files that are read and written."""

from mutants import Mutant

HUGGING_FACE = ("tests/test_hugging_face.py", "-k", "not example")
STACK = ("tests/test_hugging_face_stack.py",)
DISK = ("tests/test_cli_disk.py",)
VIDEO = ("tests/test_video.py", "tests/test_video_damaged.py")
RESUME = ("tests/test_train_resume.py", "-k", "disk_full")
DEMO = ("tests/test_demo.py", "-k", "mistake")

PATCH, FILES, DECODE = (f"timesformer/{name}.py" for name in ("integrations/hugging_face", "files", "video/decode"))

MUTANTS = [
    Mutant("Hugging Face: class row alone everywhere", PATCH, "class_row_only and i == last", "class_row_only", STACK),
    Mutant("Hugging Face: class row of a model that is asked for all", PATCH, "class_row_only and i", "i", STACK),
    Mutant(
        "Hugging Face: hooks on a layer, a model or its LayerNorm do not count",
        PATCH,
        "return own and not watched(module) and not hooked_everywhere()",
        "return own",
        STACK,
    ),
    Mutant(
        "Hugging Face: a layer's own forward does not count",
        PATCH,
        'own = type(module).forward is forward and "forward" not in module.__dict__',
        "own = type(module).forward is forward",
        STACK,
    ),
    Mutant(
        "Hugging Face: backward hooks inside a layer are lost",
        PATCH,
        'not any(watched(m) or "_hf_hook"',
        'not any(m._forward_hooks or m._forward_pre_hooks or "_hf_hook"',
        STACK,
    ),
    Mutant(
        "Hugging Face: hidden states of a merged stack",
        PATCH,
        "not (output_attentions or output_hidden_states)",
        "not output_attentions",
        HUGGING_FACE,
    ),
    Mutant("Hugging Face: no checkpointing", PATCH, "not checkpointed and _ordinary", "_ordinary", HUGGING_FACE),
    Mutant(
        "Hugging Face: a merged layer is not told the frames",
        PATCH,
        "block.run(stream, _frames_of(layer, told)",
        "block.run(stream, _frames_of(layer, None)",
        HUGGING_FACE,
    ),
    Mutant(
        "Hugging Face: a classifier's signature",
        PATCH,
        "_classifier_forward.__signature__ = signature(self.classifier_forward)",
        "pass",
        STACK,
    ),
    Mutant(
        "Hugging Face: restore forgets the classifiers",
        PATCH,
        "library.classifier.forward = library.classifier_forward",
        "pass",
        HUGGING_FACE,
    ),
    Mutant(
        "full disk: the file is not named",
        FILES,
        'raise OSError(f"cannot write {target}: {reason}") from error',
        "raise",
        DISK,
    ),
    Mutant("full disk: safetensors' error is not understood", FILES, "I/O error: ", "input and output: ", DISK),
    Mutant(
        "full disk: torch's error is not understood",
        FILES,
        "error = error.__cause__ or error.__context__",
        "error = None",
        RESUME,
    ),
    Mutant("an angle that is not right is not said", DECODE, "> 1:  # whole", "> 100:  # whole", VIDEO),
    Mutant("a file that lacks packets is taken for whole", DECODE, "total != expected or", "", VIDEO),
    Mutant("packets without their time are counted", DECODE, "packet.pts is not None and not", "not", VIDEO),
    Mutant("a clip named wrongly is no error", "timesformer/cli/demo.py", 'and motion["right"] else 1', "else 1", DEMO),
]
