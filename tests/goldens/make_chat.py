"""Write chat.json: conversations as `transformers` renders them, by DeepSeek-V3's template and by small ones written here.

    python make_chat.py DeepSeek-V3/tokenizer_config.json        needs transformers and that published file
"""
import hashlib
import json
import sys
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
TEMPLATES = {
    "blocks": "{% for m in messages %}\n    {% if m['role'] == 'user' %}\n[{{ m.content }}]\n    {% endif %}\n  {%- endfor %}\n"
              "{{ bos_token }} {{ eos_token }}\n",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=1) }}",
    "loop": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role[0] }}{% endfor %}"
            "{% if tools %}tools{% endif %}{% if add_generation_prompt %}>{% endif %}",
    "none": "{{ documents is none }}{{ nothing_of_this_name }}{{ messages | length }}",
}


def user(text):
    """A message."""
    return {"role": "user", "content": text}


def assistant(text):
    """A message."""
    return {"role": "assistant", "content": text}


def system(text):
    """A message."""
    return {"role": "system", "content": text}


CONVERSATIONS = [
    [user("Hello!")],
    [system("Be brief."), user("生抽和老抽的区别是什么？")],
    [user("1+1?"), assistant("2"), user("and 2+2?")],
    [system("You are a poet.\n"), user(" spaces \n"), assistant("  kept  "), user("<b>&amp;</b> {{ x }} {% y %}"),
     assistant(""), user("")],
    [system("One."), user("a"), system("Two."), assistant("b"), user("c"), system("")],
    [assistant("I begin."), user("Odd."), user("Twice.")],
    [system("Only this.")],
    [user("🙂 é ﷽\u200b"), assistant("```py\nprint('\\n')\n```"), user("thanks")],
]


def main(config):
    """Render and write."""
    template = json.loads(Path(config).read_text(encoding="utf-8"))["chat_template"]

    def render(source, messages):
        texts, _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=True, bos_token=BEGIN,
                                         eos_token=END)
        return texts[0]

    out = {
        "template_sha256": hashlib.sha256(template.encode()).hexdigest(),
        "v3": [{"messages": m, "text": render(template, m)} for m in CONVERSATIONS],
        "templates": [{"source": source, "messages": m, "text": render(source, m)}
                      for source in TEMPLATES.values() for m in CONVERSATIONS[:4]],
    }
    (Path(__file__).parent / "chat.json").write_text(json.dumps(out, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
