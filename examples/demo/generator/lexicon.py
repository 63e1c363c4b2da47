# ruff: noqa: E501 (tables: an entry is one line)
"""
The words of the grammar: English next to German, with what the grammar in `corpus.py` needs to know about each.

The first entries of a table are the most frequent. Where one English word has several German translations, either the
context decides (`ADJECTIVES_BY_CLASS`, the two verbs "eat", ...) or all are right and the grammar samples one: such
alternatives are separated by semicolons, the usual one first.
"""

# english plural | german gender plural (; alternative) | classes. Gender "mw": masculine with the plural's form as object.
NOUNS = """
man men | Mann m Männer | person
woman women | Frau f Frauen | person
child children | Kind n Kinder | person
dog dogs | Hund m Hunde | animal
book books | Buch n Bücher | flat readable thing
house houses | Haus n Häuser | building
car cars | Auto n Autos ; Wagen m Wagen | vehicle
boy boys | Junge mw Jungen | person
girl girls | Mädchen n Mädchen | person
cat cats | Katze f Katzen | animal
letter letters | Brief m Briefe | flat readable thing
table tables | Tisch m Tische | furniture
door doors | Tür f Türen | openable part
bread breads | Brot n Brote | food
apple apples | Apfel m Äpfel | food
teacher teachers | Lehrer m Lehrer | person
friend friends | Freund m Freunde | person
horse horses | Pferd n Pferde | animal rideable
picture pictures | Bild n Bilder ; Foto n Fotos | flat thing
bottle bottles | Flasche f Flaschen | upright thing
doctor doctors | Arzt m Ärzte ; Doktor m Doktoren | person
tree trees | Baum m Bäume | outdoor
window windows | Fenster n Fenster | openable part
chair chairs | Stuhl m Stühle | furniture upright
cake cakes | Kuchen m Kuchen | food
key keys | Schlüssel m Schlüssel | flat thing
bag bags | Tasche f Taschen | upright thing openable
bird birds | Vogel m Vögel | animal
train trains | Zug m Züge | vehicle
farmer farmers | Bauer mw Bauern ; Landwirt m Landwirte | person
neighbour neighbours | Nachbar mw Nachbarn | person
cup cups | Tasse f Tassen | upright thing
newspaper newspapers | Zeitung f Zeitungen | flat readable thing
coat coats | Mantel m Mäntel | flat clothing thing
hat hats | Hut m Hüte | flat clothing thing
fish fish | Fisch m Fische | food animal
brother brothers | Bruder m Brüder | person
sister sisters | Schwester f Schwestern | person
student students | Student mw Studenten | person
ball balls | Ball m Bälle | flat thing
bicycle bicycles | Fahrrad n Fahrräder ; Rad n Räder | vehicle drivable
egg eggs | Ei n Eier | food
lamp lamps | Lampe f Lampen | upright thing light
vase vases | Vase f Vasen | upright thing
knife knives | Messer n Messer | flat thing
tower towers | Turm m Türme | building
ship ships | Schiff n Schiffe | vehicle
mother mothers | Mutter f Mütter | person
father fathers | Vater m Väter | person
cow cows | Kuh f Kühe | animal
sheep sheep | Schaf n Schafe | animal
shoe shoes | Schuh m Schuhe | clothing upright thing
king kings | König m Könige | person
bear bears | Bär mw Bären | animal
mouse mice | Maus f Mäuse | animal
rabbit rabbits | Hase mw Hasen ; Kaninchen n Kaninchen | animal
potato potatoes | Kartoffel f Kartoffeln | food
sausage sausages | Wurst f Würste | food
glass glasses | Glas n Gläser | upright thing
song songs | Lied n Lieder | music
guitar guitars | Gitarre f Gitarren | flat music thing
piano pianos | Klavier n Klaviere | music furniture
cupboard cupboards | Schrank m Schränke | furniture openable
boat boats | Boot n Boote | vehicle
flower flowers | Blume f Blumen | flat outdoor thing
stone stones | Stein m Steine | flat outdoor thing
mountain mountains | Berg m Berge | outdoor
shop shops | Laden m Läden ; Geschäft n Geschäfte | building
gate gates | Tor n Tore | openable part
wall walls | Mauer f Mauern ; Wand f Wände | part
"""

# The first part of a compound and its German form: "garden wall" is "Gartenmauer", with the second part's gender.
COMPOUND_HEADS = ["door", "window", "lamp", "chair", "table", "wall", "key", "cupboard"]
COMPOUND_PARTS = {
    "kitchen": "Küchen",
    "garden": "Garten",
    "school": "Schul",
    "office": "Büro",
    "cellar": "Keller",
    "library": "Bibliotheks",
}

# english | german gender | class: nouns that are not counted
MASSES = """
water | Wasser n | drink
milk | Milch f | drink food
coffee | Kaffee m | drink
tea | Tee m | drink
soup | Suppe f | food
meat | Fleisch n | food
"""

NAMES = "Anna f|Peter m|Maria f|Paul m|Clara f|Thomas m"

# english where, english whither | german preposition, noun and gender: "where" takes the dative, "whither" the accusative
PLACES = """
in the garden, into the garden | in Garten m
in the kitchen, into the kitchen | in Küche f
in the house, into the house | in Haus n
in the city, into the city | in Stadt f
at school, to school | in Schule f
in the park, to the park | in Park m
at the market, to the market | auf Markt m
in the street, into the street | auf Straße f
in the forest, into the forest | in Wald m
on the beach, to the beach | an Strand m
in the village, to the village | in Dorf n
at the lake, to the lake | an See m
at the office, to the office | in Büro n
in the hospital, to the hospital | in Krankenhaus n
in the mountains, to the mountains | in Berge p
"""

# english | german (; alternative): prepositions that stand before any thing, dative for where, accusative for whither
RELATIONS = "on | auf\nunder | unter\nbehind | hinter\nnext to | neben\nin front of | vor"

# english | german (; alternative) | classes the adjective goes with
ADJECTIVES = """
old | alt | *
big | groß | *
small | klein | *
new | neu | thing furniture vehicle building part clothing readable
young | jung | person animal
red | rot | thing furniture vehicle part clothing
good | gut | person food drink readable
beautiful | schön ; hübsch | *
white | weiß | thing furniture vehicle animal part clothing building
black | schwarz | thing furniture vehicle animal clothing
cold | kalt | food drink
hot | heiß | food drink
blue | blau | thing furniture vehicle part clothing
expensive | teuer | thing furniture vehicle food drink building clothing
happy | glücklich ; froh | person
sad | traurig | person readable music
tired | müde | person animal
hungry | hungrig | person animal
heavy | schwer | thing furniture
clean | sauber | thing furniture part clothing vehicle
dirty | schmutzig ; dreckig | thing furniture part clothing animal vehicle
friendly | freundlich ; nett | person
clever | klug ; schlau | person animal
rich | reich | person
fast | schnell | vehicle animal
dangerous | gefährlich | animal vehicle
"""
# english | german by class: what the word means is decided by the noun it stands with
ADJECTIVES_BY_CLASS = """
tall | groß person ; hoch building ; hoch outdoor
short | klein person ; kurz readable ; kurz music
bright | klug person ; hell light ; hell clothing
light | leicht thing ; leicht clothing ; leicht furniture ; hell part
hard | hart food ; schwierig readable
"""

# english base, third person, past, participle, -ing | german infinitive, third person, past, participle, auxiliary
# | frame | classes of the subject | classes of the object. "an+rufen" separates; "h" is haben, "s" is sein.
VERBS = """
see sees saw seen seeing | sehen sieht sah gesehen h | acc | person animal | *
buy buys bought bought buying | kaufen kauft kaufte gekauft h | acc | person | thing furniture food drink vehicle clothing
read reads read read reading | lesen liest las gelesen h | acc | person | readable
give gives gave given giving | geben gibt gab gegeben h | dat acc | person | thing food clothing
eat eats ate eaten eating | essen isst aß gegessen h | acc | person | food
eat eats ate eaten eating | fressen frisst fraß gefressen h | acc | animal | food
find finds found found finding | finden findet fand gefunden h | acc | person animal | *
love loves loved loved loving | lieben liebt liebte geliebt h | acc | person | person animal music food
sleep sleeps slept slept sleeping | schlafen schläft schlief geschlafen h | place | person animal | -
go goes went gone going | gehen geht ging gegangen s | whither | person | -
work works worked worked working | arbeiten arbeitet arbeitete gearbeitet h | place | person | -
help helps helped helped helping | helfen hilft half geholfen h | dat | person | person animal
drink drinks drank drunk drinking | trinken trinkt trank getrunken h | acc | person | drink
drink drinks drank drunk drinking | saufen säuft soff gesoffen h | acc | animal | drink
open opens opened opened opening | auf+machen macht machte gemacht h ; öffnen öffnet öffnete geöffnet h | acc | person | openable
call calls called called calling | an+rufen ruft rief gerufen h | acc | person | person
know knows knew known - | kennen kennt kannte gekannt h | acc | person | person animal music readable building
know knows knew known - | wissen weiß wusste gewusst h | that | person | -
say says said said saying | sagen sagt sagte gesagt h | that | person | -
believe believes believed believed - | glauben glaubt glaubte geglaubt h | that | person | -
show shows showed shown showing | zeigen zeigt zeigte gezeigt h | dat acc | person | thing vehicle clothing readable
put puts put put putting | stellen stellt stellte gestellt h | acc whither | person | upright
put puts put put putting | legen legt legte gelegt h | acc whither | person | flat
write writes wrote written writing | schreiben schreibt schrieb geschrieben h | acc | person | readable
look_for looks_for looked_for looked_for looking_for | suchen sucht suchte gesucht h | acc | person animal | *
wait_for waits_for waited_for waited_for waiting_for | warten wartet wartete gewartet h | auf acc | person | person vehicle
wash washes washed washed washing | waschen wäscht wusch gewaschen h | acc | person | clothing vehicle animal
carry carries carried carried carrying | tragen trägt trug getragen h | acc | person | thing furniture
close closes closed closed closing | zu+machen macht machte gemacht h ; schließen schließt schloss geschlossen h | acc | person | openable
sing sings sang sung singing | singen singt sang gesungen h | place | person | -
play plays played played playing | spielen spielt spielte gespielt h | place | person animal | -
send sends sent sent sending | schicken schickt schickte geschickt h | dat acc | person | readable flat
ride rides rode ridden riding | reiten reitet ritt geritten h | acc | person | rideable
ride rides rode ridden riding | fahren fährt fuhr gefahren h | acc | person | drivable
run runs ran run running | laufen läuft lief gelaufen s ; rennen rennt rannte gerannt s | whither | person animal | -
think_of thinks_of thought_of thought_of thinking_of | denken denkt dachte gedacht h | an acc | person | person animal music
thank thanks thanked thanked thanking | danken dankt dankte gedankt h | dat | person | person
follow follows followed followed following | folgen folgt folgte gefolgt s | dat | person animal | person animal vehicle
visit visits visited visited visiting | besuchen besucht besuchte besucht h | acc | person | person building
live lives lived lived living | wohnen wohnt wohnte gewohnt h ; leben lebt lebte gelebt h | place | person animal | -
"""

# english third person, plural | german singular, plural: the other verb goes to the end of the clause as an infinitive
MODALS = """
wants_to want_to | will wollen
can can | kann können
must must | muss müssen
will will | wird werden
should should | soll sollen
may may | darf dürfen
"""

# english | german (; alternative)
TIMES = """
today | heute
often | oft ; häufig
in the morning | am Morgen ; morgens
now | jetzt ; nun
in the evening | am Abend ; abends
always | immer
on Sunday | am Sonntag
every day | jeden Tag ; täglich
sometimes | manchmal
on Monday | am Montag
in summer | im Sommer
again | wieder
after lunch | nach dem Mittagessen
"""
