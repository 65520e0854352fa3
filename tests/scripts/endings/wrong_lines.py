"""At least 200 wrong command lines: what is given, and what the line of error must name.

``M`` is a model, ``C`` a compressed one, ``O`` a free output, ``T`` a text, ``F`` a FIFO, ``S`` a
socket, ``H`` a hole in the path (no such file), ``D`` a directory of texts, ``A`` an array of ids.
"""

NUMBERS = ("", "x", "-5", "nan", "inf", "-inf", "1e308", "1e400", "²", "0x10", "9" * 400)
COUNTS = {
    "compress M O": (
        "--samples",
        "--seq-len",
        "--rank",
        "--budget-bytes",
        "--file-bytes",
        "--seed",
        "--distill",
    ),
    "plan M": ("--samples", "--num-processes", "--batch", "--accumulate"),
    "finetune M O --data T": (
        "--steps",
        "--batch",
        "--accumulate",
        "--every",
        "--last",
        "--devices",
    ),
    "generate M hi": ("--max-new-tokens", "--top-k", "--seed"),
    "evaluate M --tokens T": ("--windows", "--seq-len"),
    "evaluate-code M --problems T": ("--samples", "--batch", "--workers", "--first"),
    "evaluate-choices M --data T": ("--limit", "--max-length"),
    "benchmark M": ("--prefill", "--new", "--repeats"),
    "convert M O": ("--shard-bytes",),
    "demo --out O": ("--windows",),
}
REALS = {
    "compress M O": ("--keep", "--bits", "--temperature", "--distill-rate"),
    "finetune M O --data T": ("--learning-rate", "--warmup", "--weight-decay", "--clip", "--alpha"),
    "generate M hi": ("--temperature", "--top-p", "--repetition-penalty"),
    "evaluate-code M --problems T": ("--seconds", "--temperature"),
    "export C O": ("--keep",),
}
# Of the numbers above a real option takes none, an integer option neither.
OUTPUTS = {
    "compress M @": "OUT",
    "convert M @": "OUT",
    "merge C @": "OUT",
    "export C @ --to dense": "OUT",
    "finetune M @ --data T": "OUT",
    "finetune M O --data T --run @": "--run",
    "demo --out @": "--out",
    "evaluate-choices M --data T --out @": "--out",
    "inspect M --picture @": "--picture",
}
PLACES = ("", "/", ".", "F", "S", "/dev/null", "M/out", "C/a/b", "T/x", "a\0b", "n" * 300)
INPUTS = {
    "compress @ O": "MODEL",
    "compress M O --calibration @": "--calibration",
    "compress M O --calibration T:0.5,@:0.5": "--calibration",
    "plan @": "MODEL",
    "inspect @": "MODEL",
    "merge @ O": "MODEL",
    "export @ O --to dense": "MODEL",
    "convert @ O": "MODEL",
    "generate @ hi": "MODEL",
    "benchmark M @": "MODEL",
    "benchmark M --transformers @": "--transformers",
    "evaluate M --tokens @": "--tokens",
    "evaluate-code M --problems @": "--problems",
    "evaluate-choices M --data @": "--data",
    "finetune M O --data @": "--data",
    "finetune M O --data T --teacher @": "--teacher",
    "export C O --to dense --verify --tokens @": "--tokens",
}
SPECIAL = ("", "F", "S", "/dev/zero", "a\0b", "\udcff.txt")
SINGLE = (
    ("compress M O --ranks [=4", "--ranks"),
    ("compress M O --ranks (a=4", "--ranks"),
    ("compress M O --ranks mlp/down=²", "--ranks"),
    ("compress M O --ranks mlp/down=", "--ranks"),
    ("compress M O --ranks =4", "--ranks"),
    ("compress M O --ranks mlp/down=99999999999999999999", "--ranks"),
    ("compress M O --method nothing", "no method"),
    ("compress M O --dtype int3", "--dtype"),
    ("compress M O --weighting all", "--weighting"),
    ("compress M O --prefix none", "--prefix"),
    ("compress M O --mesh data=x", "mesh"),
    ("compress M O --coordinator nowhere", "--coordinator"),
    ("compress M O --process-id 1", "--coordinator"),
    ("compress M O --keep 0.5 --bits 3", "--bits"),
    ("compress M O --calibration T --seq-len 32 --distill 99999999", "--distill"),
    ("compress M O --calibration T --seq-len 32 --distill 31", "--distill"),
    ("compress M O --elastic --distill 64", "--elastic"),
    ("compress M O --mesh data=1 --distill 64", "--mesh"),
    ("compress M O --distill-rate 0.1", "--distill"),
    ("compress M M", "OUT"),
    ("compress M D/out --calibration D", "OUT"),
    ("finetune M D/out --data D", "OUT"),
    ("finetune M O --data T --run O", "OUT"),
    ("finetune M O --data T --run O/run", "--run"),
    ("finetune M O --data T --recipe none", "none"),
    ("finetune M O --data T --distill 0.5", "--distill"),
    ("generate M \udcff", "PROMPT"),
    ("generate M hi --stop \udcff", "--stop"),
    ("generate M hi --stop ", "--stop"),
    ("generate M", "PROMPT"),
    ("evaluate M --tokens T --field \udcff", "--field"),
    ("evaluate M", "--tokens"),
    ("evaluate M --tokens H", "--tokens"),
    ("demo --keeps 1,²", "--keeps"),
    ("demo --keeps 0.5,nan", "--keeps"),
    ("demo --bits 1e308", "--bits"),
    ("benchmark M --batches 1,²", "--batches"),
    ("benchmark M --batches 1,,2", "--batches"),
    ("benchmark M --picture p.png", "--picture"),
    ("benchmark M --tokens T --picture p.xyz", "p.xyz"),
    ("inspect M --picture p.xyz", "p.xyz"),
    ("inspect M --picture M/p.png", "--picture"),
    ("inspect", "MODEL"),
    ("nothing M", "nothing"),
    ("plan C", "compressed already"),
)


def lines():
    """Yields the words of every command line, and what its error must name."""
    for table in (COUNTS, REALS):
        for command, options in table.items():
            for i, option in enumerate(options):
                for j, number in enumerate(NUMBERS):
                    if (i + j) % 3 == 0 and (option, number) != ("--temperature", "1e308"):
                        yield (*command.split(), option, number), option
    for command, name in OUTPUTS.items():
        for place in PLACES:
            yield tuple(place if word == "@" else word for word in command.split()), name
    for command, name in INPUTS.items():
        for place in SPECIAL:
            if not (place == "" and ":" in command):
                yield tuple(word.replace("@", place) for word in command.split()), name
    for command, name in SINGLE:
        yield tuple(command.split(" ")), name
