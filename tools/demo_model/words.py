"""What is printed on the drawn pictures: words, sentences, numbers, codes, Chinese. Pure functions of a Random."""

import random
import string
from collections.abc import Callable

from tools.demo_model.vocab import chinese_characters

WORDS = """
about above accept account across action active actor address adult advance advice affect after again against age
agent agree air alarm all almost alone along already also always amount and animal annual answer any apple apply april
area argue arm around arrive art article ask attack august aunt author autumn available avoid away baby back bad bag
balance ball bank bar base basket bath battery beach bean bear beautiful become bed before begin behind believe bell
belong below best better between beyond bicycle big bill bird birthday black blood blue board boat body bone book
border born both bottle bottom box branch brave bread break breakfast bridge bright bring brother brown brush budget
build burn bus business busy butter button buy cable cake call camera camp can capital car card care carry case cash
castle cat catch cause center century certain chain chair chance change chapter charge cheap check cheese chicken
child choice church circle city claim class clean clear climb clock close cloth cloud coat code coffee cold color
come common company complete computer contact control cook cool copper copy corner correct cost cotton count country
course court cover cream create cross crowd cup current customer cut daily damage dance danger dark date daughter
day deal dear december decide deep degree deliver demand desk detail dinner direct discount doctor dog dollar door
double down draw dream dress drink drive dry due during duty each early earth east easy eat edge education effect egg
eight either electric eleven empty end energy engine enjoy enough enter entry equal error escape evening event ever
every exact example except exit expect express extra eye face fact fail fair fall family famous far farm fast father
february feed feel fence few field fifteen fight figure fill film final find fine finger finish fire first fish five
fix flag flat flight floor flour flower fly follow food foot force forest forget form forty forward four fox free
fresh friday friend from front fruit fuel full fun future game garden gas gate general gentle gift girl give glad
glass global gold good grain grand grape grass great green grey ground group grow guard guess guest guide guitar half
hall hammer hand happy harbor hard hat have head health hear heart heat heavy height hello help here high hill hire
history hold hole holiday home honey hope horse hospital hotel hour house how huge human hundred hungry ice idea image
important inch include income indoor inside invoice iron island item jacket january jazz job join journey judge juice
july jump june just keep kettle key kick kind king kitchen knee knife know label lake lamp land language large last
late laugh law lead leaf learn leave left lemon length lesson letter level library license life light like limit line
lion list listen little live local lock long look lost lot loud love low lucky lunch machine magazine mail main make
manager many map march mark market master match matter may meal mean measure meat media meet member memory menu metal
method middle midnight mile milk mind minute mirror miss mix model modern monday money monkey month moon more morning
most mother motor mountain mouse mouth move movie much museum music must name narrow nation nature near neck need
never new news next nice night nine noise none noon north note nothing notice november now number object ocean october
offer office often oil old olive once one onion only open option orange order other outside oven over owner oxygen
pack page paint pair palace paper parent park part party pass past path pay peace pen pencil people pepper perfect
period person phone photo piano picture piece pilot pink place plan plane plant plastic plate play please pocket point
police polite pool poor port position possible post potato pound power present press price print prize problem process
product profit program project promise proof public pull pump pure purple push quality quarter queen question quick
quiet quite rabbit race radio rail rain raise rate reach read ready real reason receipt record red reduce refund
region relax remember rent repair reply report rest result return rice rich ride right ring rise river road rock roof
room root rope rose round route row rubber rule run safe sail salad salt same sand saturday save scale school science
score sea search season seat second secret section see seed select sell send sentence september serve service seven
shade shake shape share sharp sheep sheet shelf shine ship shirt shoe shop short shoulder show shower side sign signal
silent silk silver simple since single sister six size skill skin sky sleep slow small smart smile smoke snow soap
social soft soil sold some son song soon sound soup south space speak special speed spell spend spoon sport spring
square stage stair stamp stand star start state station stay steam steel step stick still stock stone stop store storm
story straight street strong student study style subject such sugar suit summer sun sunday supply sure surface sweet
swim switch system table tail take talk tall tank taste tax tea teach team ten tennis test text than thank theater
then there thick thin thing think third this thousand three throw thunder thursday ticket tiger time tire title today
together tomato tomorrow tonight tool top total touch tour toward town toy track trade traffic train travel tree trip
true trust truth try tuesday turn twelve twenty twice two type uncle under unit until upper urban use usual valley
value vegetable very view village violin visit voice volume wait walk wall want warm wash watch water wave way weak
wealth wear weather wednesday week weight welcome well west wheel when which white whole why wide wife wild win wind
window wine winter wire wise with woman wonder wood wool word work world worth write wrong yard year yellow yes yet
young your zebra zero zone
""".split()

# Characters that many fonts draw alike (I l | and O 0) stay out of random strings, where nothing tells them apart.
PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[]_{}~^\\`"
LETTERS = "".join(character for character in string.ascii_letters if character not in "IlO")
SAFE = LETTERS + string.digits.replace("0", "")

CHINESE_WORDS = """
北京 上海 广州 深圳 中国 地址 电话 时间 价格 米饭 咖 茶 红茶 牛肉 鱼 水果 蔬菜 学校 老师 学生 医院 车站 机场 火车 飞机 公共 安全 出口 入口
禁止 小心 欢迎光临 谢谢 你好 今天 明天 星期一 周末 休息 节日 礼物 图书 房间 窗口 停车 旅游 风景 春天 夏天 秋天 冬天 太阳 月亮 大海 高山
""".split()


def word(rng: random.Random) -> str:
    text = rng.choice(WORDS)
    style = rng.random()
    return text if style < 0.5 else text.capitalize() if style < 0.78 else text.upper()


def invented(rng: random.Random) -> str:
    """A pronounceable word that is in no list."""
    parts = [rng.choice("bcdfghjklmnpqrstvwxyz") + rng.choice("aeiouy") for _ in range(rng.randint(2, 3))]
    text = "".join(parts) + rng.choice(["", rng.choice("nrstlmkd")])
    return text if rng.random() < 0.5 else text.capitalize() if rng.random() < 0.6 else text.upper()


def jumble(rng: random.Random, low: int = 3, high: int = 9) -> str:
    alphabet = rng.choice([SAFE, SAFE, LETTERS.lower(), LETTERS.upper(), string.digits, SAFE + PUNCTUATION])
    return "".join(rng.choices(alphabet, k=rng.randint(low, high)))


def number(rng: random.Random) -> str:
    digits = rng.randint(1, 7)
    value = rng.randrange(10**digits)
    forms: list[Callable[[], str]] = [
        lambda: str(value),
        lambda: f"{value:,}",
        lambda: f"${value % 10000}.{rng.randrange(100):02d}",
        lambda: f"{value % 1000}.{rng.randrange(10)}%",
        lambda: f"{rng.randrange(24):02d}:{rng.randrange(60):02d}",
        lambda: f"{rng.randint(1980, 2039)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
        lambda: f"{rng.randint(1, 28):02d}/{rng.randint(1, 12):02d}/{rng.randint(1980, 2039)}",
        lambda: f"+{rng.randint(1, 99)} {rng.randrange(1000):03d} {rng.randrange(10000):04d}",
        lambda: f"{rng.randrange(100)}-{rng.randrange(1000)}",
        lambda: f"#{value}",
        lambda: f"({value % 1000})",
    ]
    return rng.choice(forms)()


def address(rng: random.Random) -> str:
    name, host = rng.choice(WORDS), rng.choice(WORDS)
    ending = rng.choice(["com", "org", "net", "io", "cn", "de", "edu"])
    form = rng.randrange(4)
    if form == 0:
        return f"{name}@{host}.{ending}"
    if form == 1:
        return f"www.{host}.{ending}"
    if form == 2:
        return f"{name}_{rng.randrange(100)}.{rng.choice(['txt', 'py', 'jpg', 'pdf'])}"
    return f"{host}.{ending}/{name}"


def phrase(rng: random.Random) -> str:
    words = [word(rng).lower() for _ in range(rng.randint(2, 5))]
    if rng.random() < 0.3:
        words[rng.randrange(len(words) - 1)] += rng.choice([",", ";", ":", " -", " &", " +"])
    text = " ".join(words)
    if rng.random() < 0.6:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.15:
        text = rng.choice(["({})", '"{}"', "[{}]", "'{}'", "* {}", "- {}", "1. {}"]).format(text)
    return text + rng.choice(["", "", ".", "!", "?", ":", ",", "..."])


def chinese(rng: random.Random, length: int) -> str:
    """Random common characters, now and then a real word or a number among them."""
    text = ""
    while len(text) < length:
        kind = rng.random()
        if kind < 0.2:
            text += "".join(c for c in rng.choice(CHINESE_WORDS) if c in _CHINESE_SET)
        elif kind < 0.27:
            text += str(rng.randrange(100))
        else:
            text += rng.choice(_CHINESE)
    return text[:length]


_CHINESE = chinese_characters()
_CHINESE_SET = frozenset(_CHINESE)
_PIECES: list[tuple[float, Callable[[random.Random], str]]] = [
    (0.34, word), (0.13, invented), (0.22, jumble), (0.17, number), (0.05, address), (0.09, phrase),
]  # fmt: skip


def piece(rng: random.Random) -> str:
    """One thing to print, without regard to its length."""
    makers = [maker for _, maker in _PIECES]
    return rng.choices(makers, [weight for weight, _ in _PIECES])[0](rng)


def short(rng: random.Random, limit: int) -> str:
    """One piece without spaces of at most `limit` characters."""
    for _ in range(6):
        text = rng.choice([word, word, invented, jumble, number])(rng)
        if len(text) <= limit and " " not in text:
            return text
    return jumble(rng, 1, max(1, min(limit, 5)))


def similar(rng: random.Random, text: str) -> str:
    """The same beginning or end, with another letter or two in place of the rest's first or last."""
    cut, new = rng.randint(1, max(1, min(3, len(text) - 1))), "".join(rng.choices(LETTERS, k=rng.randint(1, 2)))
    return new + text[cut:] if rng.random() < 0.5 else text[:-cut] + new


def line(rng: random.Random, limit: int) -> str:
    """A line of print of at most `limit` characters, never empty."""
    text = short(rng, limit) if rng.random() < 0.25 else piece(rng)
    while len(text) < limit - 3 and rng.random() < 0.75:
        text += " " + piece(rng)
    return text[:limit].strip() or jumble(rng, 1, limit)
