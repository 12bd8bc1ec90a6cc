"""A text on which activation ranges are found (ranges.py): several kinds, as prompts are. Written for Coterie."""

TEXT = '''The kettle had just begun to sing when Marta found the letter under the door. It was folded twice, and on the
outside somebody had written, in green ink, "For whoever waters the plants." She read it standing. The neighbours on the
third floor would be away until the ninth of October; the fern wanted a cup of water every second day, the cactus
nothing at all; and would she please not mind the clock, which struck thirteen on Tuesdays.

Water boils at 100 °C at sea level, but at about 93 °C on a mountain of 2,000 metres, because the air presses less on
its surface. That is why beans take longer up there. Salt raises the boiling point a little: 58 grams in a litre make a
difference of one degree.

def mean(values: list[float]) -> float:
    """The arithmetic mean; raises ValueError for an empty list."""
    if not values:
        raise ValueError("no values")
    return sum(values) / len(values)

for name, count in {"apples": 3, "pears": 12}.items():
    print(f"{name:>8}: {count:4d}")

User: Could you suggest three things to do in a small town on a rainy afternoon?
Assistant: Of course. Here are three:
1. Visit the local museum; small ones are often free, and quiet when it rains.
2. Find a café with a window, and write the postcards that you have been putting off.
3. Ask at the library whether there is a reading or a film in the evening.
User: Thanks! And if I only have one hour?
Assistant: Then I would choose the café.

| city    | people    | founded |
|---------|-----------|---------|
| Lindau  | 25,600    | 882     |
| Bergen  | 291,000   | 1070    |
| Kotor   | 13,500    | 168 BC  |

Die Brücke war alt, aber sie hielt. Le train de nuit part à vingt-deux heures. El mercado abre los sábados por la
mañana. Questo libro non è mio. Мост закрыт до весны. 今日は雨が降っています。

Dear Mr. Okafor,

thank you for your message of 14 March. We have checked invoice no. 2031-B: the amount of $1,482.50 was charged twice,
and the second charge has been returned to your account today. It may take up to five working days until you see it. We
are sorry for the trouble. If anything remains unclear, write to help@example.org or call (555) 010-2210.

Let f(x) = x^2 - 4x + 3. Its zeros are x = 1 and x = 3, since (x - 1)(x - 3) = x^2 - 4x + 3. Between them f is negative,
and its least value, -1, lies at x = 2.

{"id": 7, "tags": ["red", "small"], "price": 0.25, "sold": false, "note": null}

"You never told me," she said, "that the bridge was gone."
"You never asked," said the ferryman, and pushed off.
'''
