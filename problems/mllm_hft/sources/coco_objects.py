"""The 80 object classes of COCO, and everyday words for them: a table of our own.

CHAIR counts a word of a class as that class. This table is not CHAIR's `synonyms.txt`; to compare
with published figures to the last digit, give that file (`synonyms: path/to/synonyms.txt`). It differs:

1. it has more words for appliances, furniture and people ("armchair", "teacup", "toddler") and fewer
   breeds, birds and trades ("chihuahua", "mallard", "villager");
2. a word that is as often no object as one is left out: groups ("a couple of zebras"), verbs ("people
   watch", "he steers"), games ("a baseball game"), food ("chicken"), coaches, who are people too. Of
   these CHAIR's has none either;
3. "pitcher" is a person, as in CHAIR's, but not in "a pitcher of water" (`mentions`).
"""

from __future__ import annotations

from types import MappingProxyType

_TABLE = """
person: man, woman, boy, girl, child, kid, baby, toddler, infant, adult, guy, lady, gentleman,
 player, skier, snowboarder, surfer, skater, skateboarder, cyclist, biker, rider, driver, passenger,
 pedestrian, worker, policeman, officer, soldier, chef, waiter, waitress, teacher, student,
 spectator, pitcher, catcher, batter, umpire, referee, athlete, farmer, tourist, bride, groom,
 father, mother, son, daughter, brother, sister, friend
bicycle: bike
car: automobile, van, minivan, sedan, suv, jeep, taxi, taxicab, cab, limousine, hatchback,
 convertible, station wagon
motorcycle: motorbike, scooter, moped
airplane: plane, aeroplane, jet, jetliner, airliner, biplane, aircraft
bus: minibus, trolleybus, double decker
train: locomotive, subway, tram, trolley
truck: lorry, pickup, semi, firetruck
boat: ship, sailboat, canoe, kayak, ferry, yacht, dinghy, raft, gondola, rowboat, motorboat, vessel
traffic light: stoplight, traffic signal, stop light, street light
fire hydrant: hydrant
stop sign:
parking meter:
bench: pew
bird: duck, goose, seagull, gull, pigeon, parrot, eagle, hawk, owl, swan, penguin, pelican,
 rooster, hen, sparrow, crow, ostrich, flamingo, heron
cat: kitten, kitty
dog: puppy, pup, poodle, retriever, terrier, spaniel, labrador, dachshund, pug, bulldog, beagle
horse: pony, stallion, mare, foal, colt
sheep: lamb, ram, ewe
cow: cattle, bull, calf, ox, heifer
elephant:
bear: panda
zebra:
giraffe:
backpack: knapsack, rucksack
umbrella: parasol
handbag: purse, pocketbook, wallet
tie: necktie
suitcase: luggage, briefcase
frisbee: flying disc
skis: ski
snowboard:
sports ball: ball, soccer ball
kite:
baseball bat:
baseball glove: baseball mitt
skateboard: longboard
surfboard: boogie board
tennis racket: racket, racquet, tennis racquet
bottle: flask
wine glass: wineglass, goblet
cup: mug, teacup
fork:
knife: pocketknife, cleaver
spoon: teaspoon, tablespoon
bowl:
banana:
apple:
sandwich: burger, hamburger, cheeseburger, panini
orange: tangerine, clementine
broccoli:
carrot:
hot dog: hotdog, corn dog
pizza:
donut: doughnut, bagel
cake: cupcake, cheesecake
chair: armchair, stool, recliner, seat
couch: sofa, loveseat, settee
potted plant: houseplant, house plant
bed: mattress, cot, crib
dining table: table, desk
toilet: urinal, commode
tv: television, telly
laptop: notebook computer, laptop computer
mouse: computer mouse
remote: remote control, remote controller
keyboard:
cell phone: phone, cellphone, smartphone, telephone, mobile phone
microwave: microwave oven
oven: stove
toaster:
sink: washbasin, basin
refrigerator: fridge, freezer
book:
clock: wristwatch, pocket watch
vase:
scissors:
teddy bear: teddy, stuffed bear, stuffed animal
hair drier: hairdryer, hair dryer, blow dryer
toothbrush:
"""


def _read() -> dict[str, tuple[str, ...]]:
    rows = (row.partition(":") for row in _TABLE.replace("\n ", " ").strip().splitlines())
    return {
        name: tuple(word.strip() for word in words.split(",") if word.strip())
        for name, _, words in rows
    }


SYNONYMS = MappingProxyType(_read())
"""Other words for each class."""
NAMES = tuple(SYNONYMS)
