"""Emoji → names and English captions, from the CLDR names in the package `emoji`; used by `draw.py`"""
import re
from collections import Counter
from emoji import EMOJI_DATA

# ---- the parts of a name

looks = ['red hair', 'curly hair', 'white hair', 'blond hair', 'bald', 'beard', 'facing right']
plurals = dict(man='men', woman='women', person='people', boy='boys', girl='girls', adult='adults', child='children')
tone_words = r' ((?:medium-)?(?:light|dark)|medium) skin tone'

irregular = {'prince': ('person with crown', 'man'), 'princess': ('person with crown', 'woman'), 'Santa Claus': ('Claus', 'man'),   # name → base, sex
             'Mrs. Claus': ('Claus', 'woman'), 'Mx Claus': ('Claus', 'person'), 'boy': ('child', 'boy'), 'girl': ('child', 'girl'), 'child': ('child', 'child'),
             'merman': ('merperson', 'man'), 'mermaid': ('merperson', 'woman'), 'merperson': ('merperson', 'person'), 'older person': ('older person', 'person'),
             'kiss': ('kiss', 'person person'), 'couple with heart': ('couple with heart', 'person person'), 'woman and man holding hands': ('people holding hands', 'woman man')}
for one in ('man', 'woman', 'person'):
    irregular[one] = ('person', one)
    for before in ('old', 'deaf', 'pregnant'): irregular[f'{before} {one}'] = (f'{"older" if before == "old" else before} person', one)
    for after in ('holding hands', 'with bunny ears', 'wrestling'): irregular[f'{plurals[one]} {after}'] = (f'people {after}', f'{one} {one}')

def cldr(e): return EMOJI_DATA[e]['en'].strip(':').replace('_', ' ').replace('’', "'")

def is_flag(e): return e[0] == '\U0001F3F4' and len(e) > 4 or '\U0001F1E6' <= e[0] <= '\U0001F1FF'

roles = {cldr(e) for e in EMOJI_DATA}

def parts(e):
    "Characters → the parts of the name: core (all but the tones), base, tone, sex, look (hair, direction, who is in a family)"
    core = cldr(e)
    if is_flag(e): return dict(core=core, base=f'flag: {core}', tone='', sex='', look='')
    tone, core = ', '.join(re.findall(tone_words, core)), re.sub(tone_words, '', core)
    look = next((l for l in looks if core.endswith(' ' + l)), '')
    base, sex = core.removesuffix(' ' + look) if look else core, ''
    if base in irregular: base, sex = irregular[base]
    elif m := re.fullmatch(r'(kiss|couple with heart) (\w+) (\w+)', base): base, sex = m[1], f'{m[2]} {m[3]}'
    elif base.startswith('family '): base, look = 'family', base[7:]
    elif m := re.fullmatch(r'(man|woman|person) (.+)', base): base, sex = m[2] if m[2] in roles else f'person {m[2]}', m[1]
    elif f'woman {base}' in roles: sex = 'person'
    return dict(core=core, base=base, tone=tone, sex=sex, look=look)

def full_name(e):
    "The name as CLDR punctuates it: 'waving hand: medium skin tone', 'flag: Japan', 'man: dark skin tone, bald'"
    p = parts(e)
    if is_flag(e): return p['base']
    if p['core'].startswith('keycap '): return 'keycap: ' + p['core'][7:]
    who = p['sex'].split() if p['base'] in ('kiss', 'couple with heart') and p['core'] != p['base'] else []
    hair = p['look'].split() if p['base'] == 'family' else [p['look']] if p['look'] in looks[:-1] else []
    after = who + [f'{t} skin tone' for t in p['tone'].split(', ') if t] + hair
    return p['core'].removesuffix(' '.join(who + hair)).strip() + ': '*bool(after) + ', '.join(after)

# ---- English for the telegram style of the names

signs = {'biohazard', 'copyright', 'customs', 'divide', 'information', 'infinity', 'minus', 'multiply', 'om', 'plus', 'prohibited', 'radioactive', 'registered', 'warning', 'wireless',
         'currency exchange', 'left luggage', 'baggage claim', 'passport control', 'potable water', 'non-potable water', 'high voltage', 'trade mark'}
zodiac = set('Aquarius Aries Cancer Capricorn Gemini Leo Libra Ophiuchus Pisces Sagittarius Scorpio Taurus Virgo'.split())
whole = {'locked': 'locked padlock', 'unlocked': 'unlocked padlock', 'locked with key': 'locked padlock with key', 'locked with pen': 'locked padlock with pen', 'foggy': 'foggy bridge',
         'star-struck': 'star-struck face', 'rolling on the floor laughing': 'face rolling on the floor laughing', 'people hugging': 'two people hugging', 'nail polish': 'hand with nail polish',
         'horse racing': 'jockey racing a horse', 'breast-feeding': 'woman breast-feeding', 'performing arts': 'performing arts masks', 'meat on bone': 'piece of meat on a bone', 'dashing away': 'puff of air', 'dizzy': 'dizzy star',
         'raised back of hand': 'raised back of a hand', 'umbrella on ground': 'umbrella on the ground', 'mount fuji': 'Mount Fuji', 'milky way': 'the Milky Way', 'Statue of Liberty': 'the Statue of Liberty',
         'Tokyo tower': 'the Tokyo tower', 'hundred points': 'a hundred points', 'dvd': 'DVD', 'dna': 'DNA', 'thread': 'spool of thread', 'kaaba': 'the Kaaba', 'flower playing cards': 'flower playing card'}
pieces = {'bouncing ball': 'bouncing a ball', 'feeding baby': 'feeding a baby', 'raising hand': 'raising a hand', 'rowing boat': 'rowing a boat', 'taking bath': 'taking a bath', 'tipping hand': 'tipping a hand',
          'in suit levitating': 'levitating in a suit', 'getting': 'getting a', 'wearing': 'wearing a', 'in lotus': 'in the lotus', r'in (?=tuxedo|manual|motorized|steamy|speech|hole|bin)': 'in a ', 'in wind': 'in the wind',
          r'(on|over|from) (?=mouth|nose)': r'\1 the ', r'behind (?=\w+)': 'behind a ', 'index pointing': 'index finger pointing', 'showing (?=Am)': 'showing the ', '(?<=with )yen': 'yen sign',
          'american': 'American', 'hindu': 'Hindu', 'latin': 'Latin', 'vulcan': 'Vulcan', '&': 'and', 'palm (up|down) hand': r'palm-\1 hand', 'call me': 'call-me', '^input (.+)': r'input button for \1'}

def natural(core):
    "'face with monocle' → 'face with a monocle', 'no smoking' → 'no smoking sign'"
    if core in zodiac: return f'the zodiac sign {core}'
    core = whole.get(core, core + ' sign' if core in signs or core.startswith('no ') else core)
    for a, b in pieces.items(): core = re.sub(rf'(?<!\w){a}' + r'\b'*(a[-1] not in ')&'), b, core)
    m = re.search(r' (?:with|without) (.+)$', core)
    return core[:m.start(1)] + article(m[1]) if m else core

after_head = r' (?:with|without|in|on|of|at|behind|over|from|for|and|to|under|(?!pushing)\w+ing|up|splayed|crossed|pointed|tilted|done|not|off)(?: |$)'
no_article = set("""bacon bamboo bread broccoli butter garlic ice salt sake spaghetti sushi soap rice oden falafel fondue custard coral corn popcorn tea luggage mate wood yarn liquid food milk water money
    tennis badminton bowling hockey lacrosse pong camping cooking fire fog confetti collision construction polish sweat hair lightning snow rain steam air weather mode DNA ZZZ""".split())
singular = set('abacus bus cactus circus compass Claus fleur-de-lis hibiscus hippopotamus lens lotus minibus octopus rhinoceros trolleybus'.split())

def article(words):
    "'a red heart', 'an ear', 'scissors': none before a plural (its head ends in s), a mass noun of `no_article` or what has one"
    head = re.split(after_head, words, maxsplit=1)[0].split()[-1].strip('(),')
    if re.match(r"(the|a|an|two) |thumbs |Mount |Santa |Mrs\. |Mx ", words): return words
    if head in no_article or head.endswith('s') and head not in singular and not head.endswith(('ss', "'s")): return words
    return ('an ' if re.match(r'(?!uni|eu|ewe|one|UP?K)[aeiouAEIO]|hour|SOS|NG |UP|x-ray', words) else 'a ') + words

def people(words):
    "['man', 'man', 'girl'] → 'two men and a girl'"
    said = [f'two {plurals[w]}' if n == 2 else article(w) for w, n in Counter(words).items()]
    return ', '.join(said[:-1]) + ' and '*(len(said) > 1) + said[-1]

def pair(p):
    "The two persons of a couple with their tones"
    who, tone = p['sex'].split(), p['tone'].split(', ')
    if len(tone) == 2: return ' and '.join(f'{article(w)} with {t} skin tone' for w, t in zip(who, tone))
    return people(who) + f', both with {tone[0]} skin tone,'*bool(p['tone'])

def country(name):
    "'Bahamas' → 'the Bahamas', 'Myanmar (Burma)' → 'Myanmar'"
    name = re.sub(r' \(.*\)| SAR China', '', name.replace('&', 'and').replace('St. ', 'Saint '))
    the = r'^(United|European|U\.S\.|Central|Dominican|Isle|British)|(Islands|Territor(y|ies)|Lands|Bahamas|Gambia|Maldives|Netherlands|Philippines|Seychelles|Comoros)$'
    return 'the ' + name if re.search(the, name) and not re.match('Heard|South Georgia', name) else name

def person(p):
    "Everyone and every hand that may have a tone: 'a man with dark skin tone raising a hand', 'a dark-skinned man raising a hand'"
    tone, look = p['tone'], p['look']
    bare = natural(p['core'].removesuffix(' ' + look) if look else p['core'])
    if look == 'bald': bare = f'bald {bare}'
    has = [f'{tone} skin tone']*bool(tone) + [dict(beard='a beard').get(look, look)]*(look == 'beard' or look.endswith('hair'))
    right = ', facing right'*(look == 'facing right')
    def told(bare, has):
        if not has: return article(bare) + right
        m = re.fullmatch(r'(man|woman|person)( (?:\w+ing|in|mountain|breast-feeding)\b.*)', bare)
        if m and ' with ' not in bare: return f"{article(m[1])} with {' and '.join(has)}{m[2]}{right}"
        return article(bare) + (' and ' if ' with ' in bare else ' with ') + ' and '.join(has) + right
    out = [told(bare, has)]
    if tone: out.append((article if article(bare) != bare else str)(f'{tone}-skinned {bare}').removesuffix(right) + (' with ' + has[1] if has[1:] else '') + right)
    for sex, word in dict(man='male', woman='female').items():
        if p['sex'] == sex and p['core'] == f"{sex} {p['base']}": out.append(told(f"{word} {p['base']}", has))
    return out

def phrases(e):
    "One to three noun phrases for a picture, the best first"
    p = parts(e)
    core, tone = p['core'], p['tone']
    if is_flag(e): return [f'the flag of {country(core)}', f'a flag of {country(core)}', f'a waving flag of {country(core)}']
    if p['base'] == 'kiss': return [f'{pair(p)} kissing', f'a kiss between {pair(p).rstrip(",")}']
    if p['base'] == 'couple with heart': return [f'{pair(p)} with a heart between them', f'{pair(p)} in love']
    if ' ' in p['sex']: return [f"{pair(p)} {p['base'].removeprefix('people ')}"]
    if p['base'] == 'family' and p['look']: return ['a family of ' + people(p['look'].split())]
    if core.startswith('keycap '): return [f'a keycap with {core[7:]}', f'a key with {core[7:]} on it']
    if re.fullmatch(r"\w+(-thirty| o'clock)", core): return [f'a clock showing {core}', f'a clock face at {core}']
    if ', ' in tone: return [f"a handshake between {' and '.join(f'{article(t)} hand' for t in tone.split(', '))}", f"a handshake of {' and '.join(tone.split(', '))} skin tone"]
    return person(p)

frames = ['emoji of {}', 'an emoji of {}', 'a picture of {}', 'a drawing of {}', 'an icon of {}', 'a small picture of {}', 'an emoji showing {}']

def captions(e):
    "All that this picture is called here, the plainest first: 9 to 12 lines, none of them twice"
    said, name = phrases(e), full_name(e)
    plain = not is_flag(e) and name == parts(e)['core'] and ' ' not in parts(e)['sex']
    framed = [f.format(said[i % len(said)]) for i, f in enumerate(frames)]
    return list(dict.fromkeys(said + [name] + [f'the {name} emoji']*plain + framed))
