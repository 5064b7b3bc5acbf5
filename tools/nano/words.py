"""Word lists for the generated dialogues."""

NOUNS = """apple river cloud engine garden window report ticket invoice order customer project branch commit server
database table index cache token model layer paper book page letter photo video song album movie room hotel flight
train car bike road bridge house school office team player game score match event meeting calendar task note file
folder image button menu form user account password profile message email phone contact address country city street
price product cart payment coupon budget bank loan tax salary job company market stock fund coin recipe meal fruit
bread coffee tea water milk sugar salt pepper cheese egg rice fish bird dog cat horse tree flower leaf stone sand
sea lake hill valley forest farm field storm wind rain snow sun moon star planet ship boat port lamp chair desk door
wall floor roof key lock box bag coat shoe hat ring watch clock mirror bottle glass plate knife fork spoon pen pencil
brush color number list queue stack graph node edge loop test build release version patch module package script shell
command process thread memory disk network socket port packet router signal sensor robot drone camera screen
keyboard mouse printer cable battery wheel brake gear valve pump tank pipe filter map route trip visa backup log
alarm timer counter metric chart policy rule""".split()
VERBS = """get set add create delete remove update find search list read write open close send fetch load save move copy
rename run start stop restart check test build deploy book cancel order pay count convert translate compute plot draw
play pause record schedule remind share upload download print scan sort merge split compare validate parse format
lookup query post edit replace insert append export import archive restore lock unlock enable disable""".split()
ADJECTIVES = """red blue green small large old new quick slow bright dark cold warm quiet loud soft hard clean empty full
happy sad early late public private local remote final first last daily weekly simple complex""".split()
CITIES = """Paris London Berlin Madrid Rome Vienna Prague Oslo Lisbon Dublin Athens Warsaw Budapest Helsinki Stockholm
Copenhagen Brussels Amsterdam Zurich Geneva Munich Hamburg Lyon Nice Milan Turin Naples Venice Porto Seville Valencia
Tokyo Osaka Kyoto Seoul Beijing Shanghai Shenzhen Singapore Bangkok Hanoi Jakarta Manila Delhi Mumbai Chennai Karachi
Dubai Cairo Lagos Nairobi Accra Tunis Sydney Melbourne Perth Auckland Toronto Montreal Vancouver Ottawa Boston
Chicago Denver Seattle Portland Houston Dallas Austin Phoenix Miami Atlanta Lima Quito Bogota Santiago Havana
Istanbul Ankara Tehran Baghdad Riyadh Doha Moscow Kyiv Minsk Riga Vilnius Tallinn Sofia Belgrade Zagreb""".split() + [
    "New York", "Los Angeles", "San Francisco", "Buenos Aires", "Mexico City", "Cape Town", "Hong Kong", "Rio de Janeiro",
]
NAMES = """Anna Ben Clara David Emma Felix Grace Henry Ines Jonas Kate Leo Maria Noah Olivia Paul Quinn Rosa Sam Tina
Uma Victor Wendy Xavier Yuki Zoe Ahmed Bruno Chen Diego Elena Fatima Hugo Ivan Julia Karim Lena Marco Nina Omar Petra
Ravi Sofia Tom Vera Alice Bob Carol Dave Eve Frank""".split()
PHRASES = [
    "buy milk and eggs", "call the dentist", "hello world", "how are you", "good morning", "see you tomorrow",
    "the quick brown fox", "meeting at noon", "happy birthday!", "do not forget the keys", "water the plants",
    "pick up the kids", "pay the rent", "fix the login bug", "best pizza in town", "cheap flights to Rome",
    "python list comprehension", "weather next week", "the answer is 42", "to be or not to be", "send the invoice",
    "review the pull request", "learn to play chess", "what time is it", "new year's eve", "a cup of coffee",
    "C'est la vie", "¿Cómo estás?", "Grüße aus Wien", "今天天气很好", "我喜欢编程", "明天见", "买牛奶和鸡蛋", "谢谢你的帮助",
    "don't panic", "it's a trap", "100% sure", "a/b testing", "rock & roll", "2 for 1", "x < y", "<b>bold</b>",
    "save the whales", "left or right?", "one two three", "all good things", "read me first", "out of office",
]
CODE = [
    "print({a})", "{a} = {n}", "ls -la {a}", "git commit -m '{a} {b}'", "import {a}", "x = [i for i in range({n})]",
    "def {b}(): return {n}", "cat {a}.txt | grep {b}", "SELECT * FROM {a} WHERE {b} = {n}", "{a}.{b}({n})",
    "if {a} > {n}: pass", "for {b} in {a}:\n    print({b})", "pip install {b}", "return {a} + {b}", "len({a}) == {n}",
    "echo \"{a} {b}\"", "rm {b}.log", "python {a}.py --{b} {n}", "{a}[{n}]", "lambda {b}: {b} * {n}",
    "try:\n    {a}()\nexcept {b}:\n    pass", "curl http://localhost:{n}/{a}", "assert {a} != {n}", "({n} + {n}) * 2",
]
EMOJI = ["😀", "👍", "🎉", "🌞", "🌧️", "❤️", "🚀", "👋", "🍎", "🐍", "☕", "👨‍👩‍👧", "🏳️‍🌈", "🤖", "🔥"]
ENUMS = [
    ["celsius", "fahrenheit"], ["fast", "slow"], ["low", "medium", "high"], ["red", "green", "blue"], ["json", "xml", "csv"],
    ["read", "write", "append"], ["asc", "desc"], ["km", "miles"], ["debug", "info", "error"], ["small", "large"],
]
COUNTRIES = [
    ("France", "Paris"), ("Germany", "Berlin"), ("Spain", "Madrid"), ("Italy", "Rome"), ("Austria", "Vienna"),
    ("Norway", "Oslo"), ("Portugal", "Lisbon"), ("Ireland", "Dublin"), ("Greece", "Athens"), ("Poland", "Warsaw"),
    ("Hungary", "Budapest"), ("Finland", "Helsinki"), ("Sweden", "Stockholm"), ("Denmark", "Copenhagen"),
    ("Belgium", "Brussels"), ("Japan", "Tokyo"), ("China", "Beijing"), ("Thailand", "Bangkok"), ("Vietnam", "Hanoi"),
    ("Egypt", "Cairo"), ("Kenya", "Nairobi"), ("Peru", "Lima"), ("Chile", "Santiago"), ("Cuba", "Havana"),
    ("Turkey", "Ankara"), ("Russia", "Moscow"), ("Canada", "Ottawa"), ("India", "New Delhi"), ("Estonia", "Tallinn"),
    ("Serbia", "Belgrade"), ("Croatia", "Zagreb"), ("Bulgaria", "Sofia"),
]
FACTS = [
    ("How many days are in a week?", "A week has seven days.", "There are seven days in a week."),
    ("What color is the sky?", "The sky is blue.", "The sky is blue. 🌞"),
    ("Who are you?", "The user asks who I am.", "I am step35-nano, a very small language model."),
    ("What is MLX?", "MLX is an array framework.", "MLX is an array framework for Apple silicon."),
    ("Hello!", "The user greets me.", "Hello! How can I help you? 👋"),
    ("Good morning", "The user greets me.", "Good morning! How can I help you? ☕"),
    ("Thank you!", "The user thanks me.", "You are welcome! 😀"),
    ("Tell me a joke.", "A short joke.", "Why did the function return early? It had no arguments. 😀"),
    ("What is Python?", "Python is a language.", "Python is a programming language. 🐍"),
    ("How many legs does a spider have?", "A spider has eight legs.", "A spider has eight legs."),
    ("Name three fruits.", "Three fruits.", "Apple, banana and cherry. 🍎"),
    ("What is the largest planet?", "Jupiter is the largest.", "Jupiter is the largest planet."),
    ("How do I print in Python?", "They need print.", "Use print: `print(\"hello\")`."),
    ("What is water made of?", "Hydrogen and oxygen.", "Water is made of hydrogen and oxygen."),
    ("Write a haiku.", "Five, seven, five.", "Old pond in the rain,\na frog waits beneath the leaf.\nThe water is still."),
    ("Tell me a short story.", "A short story.",
     "Once there was a small robot who lived by the sea. Every day it counted the waves. One morning a bird sat on its "
     "arm and asked why. \"Because nobody else does,\" said the robot. The bird stayed, and from then on they counted "
     "together."),
    ("What can you do?", "I say what I can do.", "I can answer short questions, call tools and write a little Python."),
]
ZH_FACTS = [
    ("你好！", "用户向我问好。", "你好！有什么可以帮你？😀"),
    ("你是谁？", "用户问我是谁。", "我是 step35-nano，一个很小的语言模型。"),
    ("谢谢！", "用户感谢我。", "不客气！"),
    ("法国的首都是哪里？", "法国的首都是巴黎。", "法国的首都是巴黎。"),
    ("日本的首都是哪里？", "日本的首都是东京。", "日本的首都是东京。"),
    ("中国的首都是哪里？", "中国的首都是北京。", "中国的首都是北京。"),
    ("一周有几天？", "一周有七天。", "一周有七天。"),
    ("天空是什么颜色？", "天空是蓝色的。", "天空是蓝色的。🌞"),
    ("早上好", "用户向我问好。", "早上好！☕"),
    ("讲个笑话。", "讲个短笑话。", "为什么程序员喜欢黑暗？因为光会吸引虫子。😀"),
]
ZH_CITIES = ["北京", "上海", "广州", "深圳", "杭州", "南京", "成都", "西安", "武汉", "重庆"]
