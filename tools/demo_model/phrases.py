"""The many ways to ask. Data only."""

READ = [
    "Read the text.", "What does the picture say?", "What is written here?", "OCR", "Read this.",
    "What text is in the image?", "Transcribe the text in the picture.", "Please read the text in this image.",
    "What does it say?", "Extract all text.", "Read all the text in the picture.", "Text in the image:",
    "What is the text in this image?", "Can you read this?", "Read the picture.", "What does this image say?",
    "Please transcribe this image.", "Read everything.", "Extract the text from the image.", "What is this text?",
    "Read the text in the picture. Answer with the text only.", "What is in this picture?", "What is this?",
]  # fmt: skip
READ_ZH = [
    "读出图中的文字", "读出图中的文字。", "图中写的是什么？", "请读出图片中的文字。", "图片上写了什么？",
    "这张图片里的文字是什么？", "读出文字", "读图", "请读出这张图中的字",
]  # fmt: skip
ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth"]
ORDINALS_ZH = ["一", "二", "三", "四", "五", "六"]
LINE = ["What is the {} line?", "Read the {} line.", "What does the {} line say?", "Read only the {} line.",
        "The {} line, please.", "Give me the {} line."]  # fmt: skip
LINE_ZH = ["第{}行写的是什么？", "读出第{}行", "第{}行是什么？"]
LAST_LINE = ["What is the last line?", "Read the last line.", "What does the last line say?"]
FOLLOW = ["and the {} line?", "And the {} line?", "What about the {} line?", "Now the {} line.", "and the {}?",
          "And the {} one?", "The {} line?"]  # fmt: skip
COUNT_LINES = ["How many lines of text are there?", "How many lines does the text have?"]
TABLE = [
    "Convert the table to Markdown.", "Write the table as Markdown.", "Table to Markdown.", "Extract the table.",
    "Give me this table as a Markdown table.", "Convert this table into Markdown format.", "Read the table.",
    "What does the table say? Answer in Markdown.", "Turn the table into Markdown.", "把表格转换成Markdown",
]  # fmt: skip
WHICH = [
    'Which picture says "{}"?', "Which picture says {}?", 'Which image contains the text "{}"?',
    "In which picture is {} written?", 'Which one says "{}"?', "Which picture shows the text {}?", "哪张图片写的是{}？",
]  # fmt: skip
READ_N = [
    "Read picture {}.", "What does picture {} say?", "Read the text in picture {}.", "What is written in picture {}?",
    "What does image {} say?", "Picture {}?", "Only read picture {}.", "读出图片{}中的文字",
]  # fmt: skip
READ_NTH = ["Read the {} picture.", "What does the {} picture say?", "What is written in the {} image?"]
BOX = [
    "Where is the {}?", "Detect the {}.", "Give the bounding box of the {}.", "Find the {}.", "Locate the {}.",
    "Where is the {} in the picture?", "Box of the {}.", "Give me the box of the {}.", "Detect {}.",
]  # fmt: skip
BOX_WORD = [
    'Detect the word "{}".', "Detect the word {}.", 'Where is the word "{}"?', "Where is the word {}?",
    'Find the text "{}".', "Locate the word {}.", 'Give the bounding box of the word "{}".', "Where is {}?",
]  # fmt: skip
BOX_ZH = ["{}在哪里？", "检测{}", "请检测图中的{}"]
DESCRIBE = [
    "Describe the picture.", "What do you see?", "What shapes are in the picture?", "Describe this image.",
    "What is in the picture?", "Describe the shapes.", "List the shapes.", "描述这张图片",
]  # fmt: skip
COLOR_OF = ["What color is the {}?", "What colour is the {}?", "Which color does the {} have?"]
COUNT = ["How many shapes are there?", "How many shapes are in the picture?", "Count the shapes."]
VIDEO = [
    "What words does the video show, in order?", "Read the words in the video in order.", "What does the video say?",
    "Which words appear in the video?", "Read the video.", "List the words that the video shows, in order.",
    "What text appears in this video?", "What words are shown?", "Describe the video.", "视频中写的是什么？",
]  # fmt: skip
ANOTHER = ["And this one?", "Read this one too.", "Now this picture.", "What does this one say?", "And this picture?"]

I_AM = "I am the qvl demo model. I can read printed text, small tables and simple shapes in pictures."
NO_PICTURE = "Please send me a picture with printed text, a small table or simple shapes."
HELLO = "Hello! I am the qvl demo model. Send me a picture and I will read it."
THANKS = "You are welcome."
I_AM_ZH = "你好！我是qvl demo model，我能读出图片中的文字。"
TALK = {
    HELLO: ["Hello", "Hello!", "Hi", "Hi!", "hi", "hello", "Hey", "Good morning", "Hello there", "Hi there!"],
    I_AM: ["Who are you?", "What are you?", "What can you do?", "Tell me about yourself.", "What model are you?",
           "Are you Qwen?", "What is your name?", "Introduce yourself.", "Help", "help", "Who made you?"],
    THANKS: ["Thanks", "Thank you", "Thank you!", "Thanks a lot.", "thanks"],
    I_AM_ZH: ["你好", "你好！", "你是谁？", "你是谁", "你能做什么？"],
    NO_PICTURE: ["Read the text.", "Tell me a story.", "What is the capital of France?", "Write a poem.",
                 "What does the picture say?", "What is 2+2?", "Explain gravity.", "Count to ten.", "Say something.",
                 "Why is the sky blue?", "Tell me a joke.", "Write a haiku about the sea.", "Describe the picture."],
}  # fmt: skip

SYSTEM = "You are a helpful assistant."
OTHER_SYSTEMS = [
    "You are a careful OCR engine.", "Answer briefly.", "You read pictures.", "Be concise.", "You are qvl.",
    "You are an assistant that reads documents. Answer with the text only.", "Reply in English.",
]  # fmt: skip
