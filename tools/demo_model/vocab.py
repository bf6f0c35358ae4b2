"""The demo checkpoint's tokens: one id per byte, one per common Chinese character, and Qwen2-VL's special tokens.

Knows ids and how text becomes ids. Does not know pictures, questions or the network.
"""

import json
from pathlib import Path
from typing import Any

SPECIALS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>",
    "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip

CHINESE = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里"
    "用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实"
    "日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头文体政"
    "美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及比员"
    "解水名真论处走义各入几口认条平系气题活尔更别打女变四神总何电数安少报才结反受目太量再感建务做接必场件"
    "计管期市直德资命山金指克许统区保至队形社便空决治展马科司五基眼书非则听白却界达光放强即像难且权思王象"
    "完设式色路记南品住告类求据程北边死张该交规万取拉格望觉术领共确传师观清今切院让识候带导争运笔红蓝绿黄"
    "黑灰紫橙圆方形三角星菱图片字读这写的词检测请什么哪张第行表格转换描述视频你好谁早晚左右车店票价元钱号"
    "码时间电话地址中国北京上海广州深圳米饭茶酒鱼肉菜果汁花草树木林石土火风雨雪云春夏秋冬快慢冷热远近买卖"
    "吃喝玩乐爱父母男女孩友朋校课考试班级医病药房屋室桌椅床灯窗衣服鞋帽包纸刀球歌画影戏站飞船桥街城村省县"
    "六七八九百千零半双件只根块岁周末休息假节礼送收寄邮箱网线机票旅游景区停止禁烟小心安全出口入口欢迎光临谢"
)

VOCAB_MULTIPLE = 64
END_OF_TEXT, IM_START, IM_END = SPECIALS[:3]

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_symbols() -> list[str]:
    """The printable stand-in of every byte in byte-level BPE files, by byte value."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    return [table[byte] for byte in range(256)]


def chinese_characters() -> list[str]:
    return list(dict.fromkeys(CHINESE))


def _merged_symbols() -> tuple[list[str], list[tuple[str, str]]]:
    """Symbols beyond single bytes and the merges that make them: two bytes, then the third."""
    symbols = byte_symbols()
    words = ["".join(symbols[byte] for byte in character.encode()) for character in chinese_characters()]
    pairs = list(dict.fromkeys(word[:2] for word in words))
    merges = [(pair[0], pair[1]) for pair in pairs] + [(word[:2], word[2]) for word in words]
    return pairs + words, merges


def token_ids() -> dict[str, int]:
    """Token string -> id: 256 bytes (id = byte), Chinese pieces, special tokens."""
    return {token: n for n, token in enumerate([*byte_symbols(), *_merged_symbols()[0], *SPECIALS])}


_IDS = token_ids()
SPECIAL = {token: _IDS[token] for token in SPECIALS}
_SYMBOLS = byte_symbols()
CHARACTER_ID = {
    character: _IDS["".join(_SYMBOLS[byte] for byte in character.encode())] for character in chinese_characters()
}
READABLE = [chr(code) for code in range(33, 127)] + chinese_characters()
CLASS_OF = {character: n + 1 for n, character in enumerate(READABLE)}  # 0: no character
NUM_CLASSES = len(READABLE) + 1
VOCAB_SIZE = -(-len(_IDS) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def encode(text: str) -> list[int]:
    """Ids of plain text; the same as the saved tokenizer's for text without special tokens."""
    ids: list[int] = []
    for character in text:
        known = CHARACTER_ID.get(character)
        if known is None:
            ids.extend(character.encode())
        else:
            ids.append(known)
    return ids


TOKEN_OF = {character: encode(character)[0] for character in [" ", "\n", *READABLE]}


def decode(ids: list[int]) -> str:
    """Text of ids, special tokens written out."""
    names = {n: token for token, n in _IDS.items()}
    values = {symbol: byte for byte, symbol in enumerate(_SYMBOLS)}
    data = b"".join(
        names[n].encode() if names[n] in SPECIAL else bytes(values[symbol] for symbol in names[n]) for n in ids
    )
    return data.decode(errors="replace")


def tokenizer_json() -> dict[str, Any]:
    vocab = {token: n for token, n in _IDS.items() if token not in SPECIAL}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": n, "content": token, **flags} for token, n in SPECIAL.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [f"{left} {right}" for left, right in _merged_symbols()[1]],
        },
    }


def tokenizer_config() -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(n): {"content": token, **flags} for token, n in SPECIAL.items()},
        "additional_special_tokens": list(SPECIALS[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "errors": "replace",
        "model_max_length": 8192,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def save_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(), ensure_ascii=False, indent=1) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(), ensure_ascii=False, indent=2) + "\n")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}, indent=2) + "\n")
