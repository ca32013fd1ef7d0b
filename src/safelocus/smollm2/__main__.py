"""`python -m safelocus.smollm2`: get the model, unless it is there."""

import sys

from safelocus.errors import SafelocusError


def main() -> int:
    from safelocus.smollm2 import folder, source

    def say(text: str) -> None:
        sys.stderr.write(f"{text}\n")

    try:
        record = source.obtain(say=say)
    except SafelocusError as error:
        say(str(error))
        return 1
    say(f"smollm2: from the {record['source']} ({record['name']}; weights {record['weights']}), in {folder('smollm2')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
