"""A conversation in which each request has only the new text: python examples/sessions.py BUNDLE.

BUNDLE must have a chat template: a chat model of `edgelm models`, such as smollm2-135m after `edgelm pull`.
"""

import sys

import edgelm

QUESTIONS = ("Give me a name for a cat.", "Another one, please.", "Which of the two is shorter?")

if len(sys.argv) != 2:
    raise SystemExit("usage: python examples/sessions.py BUNDLE")

with edgelm.load(sys.argv[1]) as lm:
    for number, question in enumerate(QUESTIONS, 1):
        message = {"role": "user", "content": question}
        is_last = number == len(QUESTIONS)
        done = lm.generate(messages=[message], session="anna", max_tokens=48, end_session=is_last)
        usage = done.usage
        print(f"{question}\n  {done.text}")
        print(f"  turn {done.turn}: {usage.cached_tokens} of {usage.prompt_tokens} prompt tokens were cached")
    print("open sessions:", lm.sessions())
