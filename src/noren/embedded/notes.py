"""Made-up private notes of three sites, from a seed.

Every person, number and event is invented by a seeded generator. Telephone numbers come from the ranges
that the British regulator sets aside for fiction, so none of them can reach anybody.

Three sites keep notes, each in a house style of its own:

* ``clinic``: a doctor's shorthand, all abbreviations and slashes;
* ``desk``: tickets of an IT service desk, chatty;
* ``ward``: a nurse's spoken handover, in courteous full sentences.

``plain`` tells the same kinds of events in neutral prose. A model trained on `pretraining` (mostly
``plain``) knows the subject matter but hardly the house styles, so tuning it on one site visibly helps.

The same arguments give the same notes on every Python version: the only random source is
``random.Random.random``, whose sequence for a given seed the standard library promises to keep.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["PLAIN", "SITES", "Note", "notes", "pretraining"]

SITES: tuple[str, ...] = ("clinic", "desk", "ward")
"""The sites with a house style of their own."""

PLAIN = "plain"
"""Name of the neutral style, a mixture of all three subject matters."""

HOUSE_SHARE = 0.01
"""Share of `pretraining` notes in house style (all three sites together); the rest are plain."""

_T = TypeVar("_T")
_Said = tuple[str, str]  # the same thing in plain words and in the house's own words
_Case = Mapping[str, tuple[_Said, ...]]


@dataclass(frozen=True)
class Note:
    """One made-up note.

    `secrets` are the private strings planted in `text`, each exactly as it stands there: names of
    people, telephone numbers, dates, and record, ticket and asset numbers.
    """

    site: str
    text: str
    secrets: tuple[str, ...]


# --------------------------------------------------------------------------------------------------
# Names and small lists
# --------------------------------------------------------------------------------------------------


def _words(text: str, between: str | None = None) -> tuple[str, ...]:
    """Split a list of words, or of phrases with `between` between them."""
    return tuple(word.strip() for word in text.split(between))


_WOMEN = _words("""
Abena Ada Adele Agnes Aiko Aileen Aisha Alba Alice Alma Amara Amelie Amina Ana Anjali Anneke Anya Astrid
Aurora Ayesha Beatrix Bella Berit Bianca Birgit Brenda Bridget Bronwen Camille Carla Carmen Catrin Celia
Chiara Chloe Clara Colette Dagmar Dalia Daphne Deepa Delia Dina Dolores Doreen Edith Eilidh Elena Elif
Elsa Esme Esther Eunice Fatima Fay Farah Fiona Flora Freya Frida Gemma Gerda Gita Gloria Grace Greta Gwen
Hana Harriet Hedda Helga Hilda Ida Ilse Imogen Ines Ingrid Irena Iris Isla Ivana Jacinta Jamila Janet
Jasmin Joan Josie Judith Julia Kamala Karin Katya Keiko Kirsten Lalita Larissa Leila Lena Lidia Linnea
Lotte Lucia Mabel Magda Maeve Malika Marta Maud Mei Mina Mira Moira Nadia Naomi Nasrin Nell Nina Noor Olga
Olive Paloma Petra Philippa Pia Priya Rania Rhona Rosa Ruth Sabine Saskia Selma Shanti Sheila Sigrid
Sunita Sylvia Tamsin Tara Thandi Thea Ursula Valerie Vera Wanda Wilma Yara Yasmin Yuki Zadie Zainab Zelda
Zoe
""")

_MEN = _words("""
Aaron Abel Adrian Ahmed Akira Alasdair Albin Aled Alfred Amir Anders Angus Anil Anton Arjun Arlo Arthur
Axel Bashir Benno Bernard Bilal Boris Bruno Calum Carlos Casper Cedric Chidi Claude Clive Conrad Cormac
Cyril Damian Darius Dennis Derek Desmond Dilip Dimitri Douglas Duncan Edgar Edmund Edwin Eamon Elias Emil
Enzo Ernest Errol Esteban Ewan Fabio Farid Felix Fergus Filip Finlay Floyd Francis Franz Gareth Gavin
Gerald Gilbert Giles Gordon Graham Gustav Hamid Hamish Harold Hassan Hector Henrik Hiro Howard Hugo
Ibrahim Igor Isaac Ivan Ivor Jamal Jarvis Jens Joel Jonas Jorge Joshua Julian Kamal Karl Keith Kenji Kofi
Kurt Kwame Lars Laszlo Leif Leon Leroy Lionel Lorenz Luca Magnus Malcolm Manuel Marek Mateo Maurice Milan
Miles Morris Nabil Neil Nigel Niklas Noah Norman Odin Olaf Omar Oscar Osman Otto Pablo Pascal Percy Pavel
Piotr Quentin Rafael Rajesh Ralph Ramon Rashid Reuben Roland Rory Ross Rufus Rupert Samir Sandeep Stefan
Stellan Sunil Tariq Tobias Tomas Trevor Umar Victor Viktor Vikram Vincent Walter Wesley Wilfred Winston
Yannick Yusuf
""")

_SURNAMES = _words("""
Abara Achterberg Adeyemi Agarwal Ainsworth Akhtar Albright Almeida Amadi Andersen Anwar Appleyard
Arkwright Ashdown Aydin Backhouse Bakker Banerjee Barlow Baptiste Beaumont Bellweather Bergstrom Bhatt
Birdsall Blakemore Boateng Borland Bosworth Brandt Brennan Brightwell Bukowski Calder Campion Cardoso
Carmody Castellano Chatterjee Chaudhry Chen Chukwu Claremont Clegg Coburn Conti Copeland Corrigan Costa
Cragg Crowther Dalgaard Dasgupta Delgado Desai Devlin Diallo Dobson Donoghue Dragic Dubois Dunmore
Eastwood Ekstrom Ellery Eriksen Esposito Fairbairn Farooqi Fenwick Ferreira Fielding Fontaine Forsythe
Fujita Galbraith Ganguly Garrido Gaskell Gebhardt Ghosh Giordano Goddard Gorman Greaves Grimshaw
Gunnarsson Gupta Haddad Haldane Halloran Hammersley Haraldsen Hartigan Hashimoto Hawthorne Hegarty Henshaw
Herrera Hodgkiss Holmqvist Horvath Hosseini Huang Hussain Ibsen Iqbal Ishikawa Iyer Jankowski Jarrett
Jenssen Jobson Kaczmarek Kapoor Karlsen Katz Kavanagh Keane Kellaway Khatun Kimura Kinsella Kirkbride
Kovacs Kowalski Kruger Kulkarni Lachance Langford Larkin Lassiter Laurent Leclerc Lindqvist Lockhart
Lombardi Lowther Mackay Maddox Mahmood Malhotra Mancini Marchetti Marlowe Mbeki McAllister McBride Mehta
Meijer Mendoza Merriweather Moller Montague Moreau Moretti Mukherjee Nakamura Nasser Navarro Ndiaye Nguyen
Nordahl Novak Nwosu Oakley Obi Oduya Okafor Okonkwo Olsson Ortega Osborne Osei Ouellet Padgett Palmgren
Pankhurst Papadakis Patel Pemberton Pereira Petrov Pickering Popescu Prendergast Quigley Qureshi Radcliffe
Rahman Ramsbottom Rasmussen Redfern Reinholt Rezaei Riordan Rossetti Rowntree Sadler Salazar Sandoval Sato
Savary Schreiber Seddon Shah Sharpe Siddiqui Sinclair Skinner Solberg Soto Stanhope Sundaram Suzuki Szabo
Tanaka Tattersall Thackeray Thorne Tierney Tremblay Tsang Underhill Uzun Valdez Vandenberg Varga Venter
Vickers Villanueva Wadsworth Walcott Wang Weatherby Weiss Whitlock Wierzba Winterbourne Wolstenholme Xu
Yamada Yeo Yilmaz Zafar Zapata Zhang Zielinski
""")

_MONTHS = _words("January February March April May June July August September October November December")
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_SPANS: tuple[_Said, ...] = (
    ("two days", "2/7"), ("three days", "3/7"), ("four days", "4/7"), ("five days", "5/7"),
    ("a week", "1/52"), ("two weeks", "2/52"), ("three weeks", "3/52"), ("six weeks", "6/52"),
    ("a month", "1/12"), ("two months", "2/12"), ("three months", "3/12"),
)  # fmt: skip
_REVIEWS: tuple[_Said, ...] = (
    ("in two days", "2/7"), ("in three days", "3/7"), ("in a week", "1/52"), ("in two weeks", "2/52"),
    ("in four weeks", "4/52"), ("in six weeks", "6/52"), ("in three months", "3/12"),
)  # fmt: skip
_HOW_OFTEN: Mapping[str, str] = {
    "od": "once a day", "bd": "twice a day", "tds": "three times a day", "qds": "four times a day",
    "nocte": "at night", "prn": "when needed", "stat": "as a single dose",
}  # fmt: skip
_PHONE_RANGES = ("01632 960", "07700 900", "0113 4960", "0114 4960", "0117 4960", "0161 4960", "020 7946 0")
_DEPARTMENTS = _words(
    """
payroll;legal;the library;the post room;purchasing;finance;the print shop;planning;the front desk;catering;
estates;human resources;the warehouse;marketing;the research office;training;admissions;the labs;the archive;
security;the call centre;the directors' office;sales;transport;the translation team
""",
    ";",
)
_WARDS = _words("""
Alder Ash Aspen Beech Birch Cedar Cherry Elm Hawthorn Hazel Juniper Larch Linden Maple Oak Poplar Rowan Willow
""")
_RELATIONS = (
    ("daughter", True), ("sister", True), ("wife", True), ("niece", True), ("mother", True),
    ("son", False), ("brother", False), ("husband", False), ("nephew", False), ("father", False),
)  # fmt: skip

# One drug a line: name, doses, how often it is given.
_DRUG_TABLE = """
aciclovir | 400 mg, 800 mg | qds
alginate | 10 ml, 20 ml | qds, prn
allopurinol | 100 mg, 300 mg | od
amitriptyline | 10 mg, 25 mg | nocte
amlodipine | 5 mg, 10 mg | od
amoxicillin | 500 mg, 1 g | tds
apixaban | 2.5 mg, 5 mg | bd
aspirin | 75 mg, 300 mg | od
atorvastatin | 20 mg, 40 mg, 80 mg | nocte
beclometasone | 100 mcg, 200 mcg | bd
betahistine | 8 mg, 16 mg | tds
betamethasone | a thin layer | od, bd
bisoprolol | 1.25 mg, 2.5 mg, 5 mg | od
carvedilol | 3.125 mg, 6.25 mg | bd
cefalexin | 500 mg | bd, tds
ceftriaxone | 1 g, 2 g | od
cetirizine | 10 mg | od
cinnarizine | 15 mg, 30 mg | tds
ciprofloxacin | 250 mg, 500 mg | bd
citalopram | 10 mg, 20 mg | od
clarithromycin | 250 mg, 500 mg | bd
clindamycin | 300 mg, 450 mg | qds
clopidogrel | 75 mg | od
codeine | 15 mg, 30 mg | qds, prn
colchicine | 500 mcg | bd, tds
cyanocobalamin | 50 mcg | od
cyclizine | 50 mg | tds, prn
dapagliflozin | 10 mg | od
dexamethasone | 4 mg, 8 mg | od, bd
diazepam | 2 mg, 5 mg | nocte, prn
diclofenac | 50 mg, 75 mg | bd
digoxin | 62.5 mcg, 125 mcg | od
diltiazem | 60 mg, 90 mg | bd
doxycycline | 100 mg, 200 mg | od
empagliflozin | 10 mg, 25 mg | od
enoxaparin | 20 mg, 40 mg, 80 mg | od
famotidine | 20 mg, 40 mg | bd
ferrous sulfate | 200 mg | od, bd
fexofenadine | 120 mg, 180 mg | od
flucloxacillin | 500 mg, 1 g | qds
fluticasone | 50 mcg, 100 mcg | od, bd
folic acid | 5 mg | od
furosemide | 20 mg, 40 mg, 80 mg | od, bd
gabapentin | 100 mg, 300 mg | tds
gentamicin | 240 mg, 320 mg | od
gliclazide | 40 mg, 80 mg | od, bd
haloperidol | 500 mcg, 1 mg | prn, nocte
hydrocortisone | a thin layer | bd
ibuprofen | 200 mg, 400 mg | tds
indapamide | 1.5 mg, 2.5 mg | od
insulin glargine | 10 units, 14 units, 18 units | nocte
isosorbide mononitrate | 20 mg, 30 mg | bd
lactulose | 10 ml, 15 ml | bd
lansoprazole | 15 mg, 30 mg | od
levetiracetam | 250 mg, 500 mg, 1 g | bd
levothyroxine | 25 mcg, 50 mcg, 100 mcg | od
lisinopril | 2.5 mg, 5 mg, 10 mg | od
loperamide | 2 mg | prn
loratadine | 10 mg | od
losartan | 25 mg, 50 mg | od
melatonin | 2 mg | nocte
metformin | 500 mg, 850 mg, 1 g | bd
metoclopramide | 10 mg | tds, prn
metronidazole | 400 mg, 500 mg | tds
mirtazapine | 15 mg, 30 mg | nocte
montelukast | 10 mg | nocte
morphine | 2.5 mg, 5 mg, 10 mg | prn, qds
naproxen | 250 mg, 500 mg | bd
nitrofurantoin | 50 mg, 100 mg | bd, qds
omeprazole | 20 mg, 40 mg | od
ondansetron | 4 mg, 8 mg | tds, prn
oxycodone | 5 mg, 10 mg | bd, prn
pantoprazole | 40 mg | od, bd
paracetamol | 500 mg, 1 g | qds, prn
phenytoin | 100 mg, 300 mg | od, nocte
prednisolone | 20 mg, 30 mg, 40 mg | od
prochlorperazine | 5 mg | tds, prn
propranolol | 10 mg, 40 mg | bd, tds
ramipril | 1.25 mg, 2.5 mg, 5 mg | od
rivaroxaban | 15 mg, 20 mg | od
salbutamol | 2 puffs, 4 puffs | prn, qds
senna | 7.5 mg, 15 mg | nocte
sertraline | 50 mg, 100 mg | od
sitagliptin | 50 mg, 100 mg | od
spironolactone | 12.5 mg, 25 mg | od
sumatriptan | 50 mg, 100 mg | prn
tamsulosin | 400 mcg | od
thiamine | 100 mg | bd, tds
tiotropium | 18 mcg | od
topiramate | 25 mg, 50 mg | nocte, bd
tramadol | 50 mg, 100 mg | prn, qds
trimethoprim | 200 mg | bd
vancomycin | 125 mg, 1 g | bd, qds
warfarin | 1 mg, 3 mg, 5 mg | od
zopiclone | 3.75 mg, 7.5 mg | nocte
"""

# --------------------------------------------------------------------------------------------------
# Cases. One block a case; in every field entries are parted by ";", plain words and house words by "=".
# --------------------------------------------------------------------------------------------------

# said: what the patient tells; found: on examination; tests; drugs; told: advice.
_ILLNESSES = """
name: angina = ?angina
said: tightness in the chest on the stairs = chest tightness o/e; a heavy feeling in the chest when
  walking uphill = central CP on hills
found: the heart sounds were normal = HS I+II+0; the chest was clear = chest clear; the ankles were not
  swollen = no SOA
tests: a heart tracing = ECG; a troponin level = trop; a treadmill test = ETT
drugs: bisoprolol; aspirin; isosorbide mononitrate; atorvastatin
told: to rest when the pain comes on = rest w/ pain; to call an ambulance if the pain lasts = 999 if
  >15min

name: a chest infection = LRTI
said: a cough with green phlegm = prod cough, green sputum; a cough and a fever = cough + fever; chills
  and a wet cough = rigors, wet cough
found: there were crackles at the right base = creps R base; there were crackles at the left base = creps
  L base; the throat was a little red = throat sl red
tests: a chest film = CXR; a sputum culture = sputum MC&S; blood tests = FBC/CRP
drugs: amoxicillin; doxycycline; clarithromycin; paracetamol
told: to drink plenty = push fluids; to come back if breathing gets harder = safety net SOB

name: asthma = asthma flare
said: wheezing at night = nocturnal wheeze; a tight chest and a dry cough = tight chest, dry cough;
  breathlessness after running = SOB post exercise
found: there was wheeze on both sides = bilat exp wheeze; the peak flow was low = PEFR down; speech came
  in full sentences = full sentences
tests: a peak flow diary = PEFR diary; a breathing test = spirometry
drugs: salbutamol; prednisolone; beclometasone; montelukast
told: to use the spacer every time = use spacer; to keep away from smoke = avoid smoke

name: chronic lung disease = IECOPD
said: more breathlessness than usual = SOB ++ on baseline; more cough and darker phlegm = incr cough, dark
  sputum
found: there was wheeze throughout = widespread wheeze; the breath sounds were quiet = quiet BS; the
  fingers were stained = tar staining
tests: a chest film = CXR; a breathing test = spirometry; a sputum culture = sputum MC&S
drugs: doxycycline; prednisolone; tiotropium; salbutamol
told: to stop smoking = smoking cessation; to keep the rescue pack at home = rescue pack

name: heart failure = CCF
said: swollen ankles and tiredness = SOA, fatigue; breathlessness lying flat = orthopnoea x3 pillows
found: the ankles were swollen to the shin = pitting oedema to shin; the neck veins were raised = JVP up;
  there were fine crackles at both bases = bibasal creps
tests: a scan of the heart = echo; kidney blood tests = U&E; a heart hormone level = BNP
drugs: furosemide; spironolactone; ramipril; carvedilol; dapagliflozin
told: to weigh every morning = daily wts; to cut down on salt = low salt

name: an irregular heartbeat = AF
said: a fluttering heart = palps; palpitations and light-headedness = palps + lightheaded
found: the pulse was irregular = irreg irreg; there was no murmur = no murmur; the thyroid felt normal =
  thyroid NAD
tests: a heart tracing = ECG; a thyroid level = TFT; a day-long heart monitor = 24h tape
drugs: apixaban; bisoprolol; digoxin; diltiazem
told: to cut down on coffee = less caffeine; to watch for bleeding = bleeding advice

name: high blood pressure = HTN
said: raised readings at home = raised home BPs; a raised reading at the pharmacy = high BP at pharmacy
found: the backs of the eyes looked normal = fundi NAD; the heart sounds were normal = HS I+II+0; the
  urine was clear = dip NAD
tests: kidney blood tests = U&E; a day-long pressure monitor = ABPM; a heart tracing = ECG
drugs: amlodipine; losartan; indapamide; ramipril; lisinopril
told: to walk for half an hour each day = exercise; to cut down on salt = low salt

name: diabetes = T2DM
said: thirst and passing a lot of water = polyuria/polydipsia; tiredness and blurred sight = tired, blurry
  vision
found: the feet had good pulses = foot pulses OK; feeling in the toes was reduced = reduced toe sensation;
  the weight was up = wt up
tests: a long-term sugar level = HbA1c; an eye photograph = retinal screen; kidney blood tests = U&E
drugs: metformin; gliclazide; empagliflozin; sitagliptin
told: to see the dietitian = ref dietitian; to check the feet every evening = foot care

name: a urine infection = UTI
said: burning on passing water = dysuria + freq; lower belly pain and cloudy urine = suprapubic pain,
  cloudy urine
found: the lower belly was tender = suprapubic tenderness; there was no pain over the kidneys = no loin
  tenderness; the urine showed white cells = dip leu+ nit+
tests: a urine culture = MSU; kidney blood tests = U&E
drugs: nitrofurantoin; trimethoprim; cefalexin
told: to drink plenty = push fluids; to come back if there is a fever = safety net pyrexia

name: a kidney stone = renal colic
said: pain from the back to the groin = loin to groin pain; waves of pain in the side = colicky flank pain
found: the right side was tender = R loin tender; the left side was tender = L loin tender; the urine
  showed blood = dip bld++
tests: a scan of the kidneys = CT KUB; kidney blood tests = U&E; a calcium level = Ca
drugs: diclofenac; tamsulosin; ondansetron
told: to sieve the urine = sieve urine; to drink plenty = push fluids

name: gout = acute gout
said: a hot and painful big toe = hot red MTPJ; a swollen foot since the night = foot swelling o/n
found: the joint was red and very tender = MTPJ red, exq tender; there was no wound = skin intact; there
  was no fever = apyrexial
tests: a urate level = urate; kidney blood tests = U&E
drugs: colchicine; naproxen; allopurinol
told: to rest the foot = rest + ice; to cut down on beer = less EtOH

name: migraine = migraine
said: a throbbing headache on one side = unilat throbbing HA; headaches with flashing lights = HA w/ aura
found: the nerves of the face were normal = CN II-XII NAD; the neck was not stiff = no meningism; the eyes
  were normal = PERL
tests: a headache diary = HA diary; blood tests = FBC/CRP
drugs: sumatriptan; propranolol; metoclopramide; topiramate
told: to rest in a dark room = dark room; to keep regular meals = reg meals

name: back strain = mech LBP
said: low back pain after lifting = LBP post lifting; a stiff back in the mornings = am back stiffness
found: bending forward was limited = flexion limited; the leg reflexes were normal = reflexes NAD; raising
  the leg was painless = SLR 90 bilat
tests: a film of the spine = XR L-spine; a visit to physiotherapy = ref physio
drugs: naproxen; codeine; diazepam; paracetamol
told: to keep moving = stay active; to come back if a leg goes numb = CES red flags

name: worn knees = knee OA
said: aching knees on the stairs = bilat knee pain stairs; a stiff and creaking knee = stiff knee,
  crepitus
found: the knee was swollen = small effusion; the knee could not bend fully = flexion 100; the hip was
  normal = hip NAD
tests: a film of the knee = XR knee; a visit to physiotherapy = ref physio
drugs: paracetamol; ibuprofen; codeine; naproxen
told: to strengthen the thigh = quads exs; to lose some weight = wt loss

name: acid reflux = GORD
said: burning behind the breastbone after meals = retrosternal burning pc; a sour taste at night = acid
  brash nocte
found: the upper belly was a little tender = mild epigastric tenderness; the belly was soft = abdo SNT;
  the weight was steady = wt stable
tests: a stool test for a stomach germ = H pylori stool; a camera test = ref OGD
drugs: omeprazole; lansoprazole; famotidine; alginate
told: to eat early in the evening = no late meals; to raise the head of the bed = raise bed head

name: a stomach bug = D&V
said: watery stools and cramps = loose stools + cramps; vomiting and loose stools = D+V
found: the mouth was dry = dry MM; the belly was soft = abdo SNT; the skin was warm and pink = CRT <2s
tests: a stool culture = stool MC&S; kidney blood tests = U&E
drugs: loperamide; ondansetron; cyclizine
told: to sip water often = ORS sips; to stay off work until well = off work 48h

name: a skin infection = cellulitis
said: a red and hot lower leg = hot red leg; a spreading redness round a bite = spreading erythema ?bite
found: the redness was marked with a pen = margin marked; the calf was soft = calf SNT; there was a small
  wound on the foot = foot wound
tests: a wound swab = swab MC&S; blood tests = FBC/CRP
drugs: flucloxacillin; clarithromycin; clindamycin
told: to keep the leg up = elevate; to come back if the redness spreads = r/v if spreads

name: eczema = atopic eczema
said: an itchy rash on the arms = itchy rash flexures; dry and cracked hands = dry cracked hands
found: the skin was dry and red = dry erythematous patches; there was no sign of infection = not infected;
  there were scratch marks = excoriations
tests: a skin swab = skin swab; a patch test = ref patch testing
drugs: hydrocortisone; betamethasone; cetirizine
told: to use plenty of moisturiser = emollient ++; to avoid soap = soap sub

name: hay fever = allergic rhinitis
said: sneezing and itchy eyes = sneezing, itchy eyes; a blocked nose all summer = nasal block seasonal
found: the lining of the nose was pale = pale turbinates; the eyes were red = inj conjunctivae; the chest
  was clear = chest clear
tests: an allergy test = RAST; a nose swab = nasal swab
drugs: loratadine; fexofenadine; fluticasone; cetirizine
told: to keep the windows shut = avoid pollen; to start before the season = start pre season

name: depression = low mood
said: low mood and poor sleep = low mood, EMW; no pleasure in things and little energy = anhedonia, low
  energy
found: eye contact was poor = poor eye contact; there were no thoughts of self-harm = no TSH; speech was
  slow = speech slow
tests: a mood score = PHQ9; a thyroid level = TFT
drugs: sertraline; citalopram; mirtazapine
told: to try talking therapy = IAPT; to see friends each week = behav activation

name: poor sleep = insomnia
said: lying awake until late = init insomnia; waking at four every morning = EMW
found: the mood was steady = mood euthymic; the weight was steady = wt stable; there was no tremor = no
  tremor
tests: a sleep diary = sleep diary; a thyroid level = TFT
drugs: melatonin; zopiclone; amitriptyline
told: to put the screen away before bed = sleep hygiene; to get up at the same time = fixed wake time

name: a slow thyroid = hypothyroid
said: tiredness and feeling cold = tired, cold intol; weight gain and dry skin = wt gain, dry skin
found: the reflexes were slow = slow relaxing reflexes; the skin was dry = dry skin; the thyroid was a
  little large = small goitre
tests: a thyroid level = TFT; a cholesterol level = lipids
drugs: levothyroxine
told: to take the tablet before breakfast = take ac; to have the level checked again = rpt TFT 6/52

name: low iron = IDA
said: tiredness and pale skin = TATT, pale; breathlessness and thinning hair = SOB, hair loss
found: the inner eyelids were pale = conj pallor; the nails were brittle = brittle nails; the belly was
  soft = abdo SNT
tests: an iron level = ferritin; a blood count = FBC; a stool blood test = FIT
drugs: ferrous sulfate; folic acid; cyanocobalamin
told: to take the tablets with juice = w/ vit C; to expect dark stools = dark stools advice

name: an ear infection = otitis media
said: earache and poor hearing = otalgia, reduced hearing; a running ear = otorrhoea
found: the drum was red and bulging = TM red bulging; there was pus in the canal = pus in EAC; the bone
  behind the ear was not tender = mastoid NAD
tests: an ear swab = ear swab; a hearing test = audiogram
drugs: amoxicillin; paracetamol; ibuprofen; clarithromycin
told: to keep the ear dry = keep dry; to come back if hearing does not recover = r/v if persists

name: shingles = zoster
said: a burning rash on one side = unilat painful rash; blisters round the waist = vesicles dermatomal
found: there were blisters in a band = vesicles T8; the eye was not involved = eye spared; the skin was
  sore to touch = allodynia
tests: a swab of a blister = vesicle swab
drugs: aciclovir; gabapentin; amitriptyline; paracetamol
told: to keep the rash covered = cover rash; to stay away from newborns = avoid preg/neonates

name: inner ear dizziness = BPPV
said: a spinning feeling on turning over = vertigo rolling in bed; dizziness and feeling sick = dizzy,
  nausea
found: turning the head brought on the dizziness = Dix-Hallpike +ve; hearing was normal = hearing NAD;
  walking was steady = gait NAD
tests: a hearing test = audiogram; a balance test = ref vestib
drugs: betahistine; prochlorperazine; cinnarizine
told: to get up slowly = rise slowly; not to drive while dizzy = no driving
"""

# item: what is broken (house words: the letters of its asset tag); does: what it does wrong; cause and fix:
# the n-th cause has the n-th fix; after: what came of it.
_FAULTS = """
item: laptop = LT; tablet = TB
does: loses the wireless connection = keeps dropping off the wifi; cannot find the office network = just
  won't see the wifi
cause: the wireless driver was out of date = the wifi driver was ancient; the access point was full = the
  poor access point was rammed
fix: installed the new driver = popped the new driver on; moved it to another channel = nudged it onto a
  quieter channel
after: the signal stayed up for an hour = it's been rock solid since; the speed test passed = speed test
  looks lovely

item: printer = PR; label printer = LP
does: prints blank pages = is spitting out blank sheets; jams on every second sheet = chews up every other
  page; shows as offline = says it's offline when it clearly isn't
cause: the paper tray was set to the wrong size = the tray thought it had the wrong paper; the roller was
  worn = the roller's had its day; the queue was stuck = one monster job was clogging the queue
fix: set the tray to the right size = told the tray what's what; replaced the roller = swapped the roller
  out; cleared the queue and restarted it = kicked the queue and turned it off and on again
after: a test page came out well = test page came out a treat; ten pages printed without a jam = ten
  pages, not one jam

item: account = AC
does: is locked after a new password = got locked right after the password change; refuses the password =
  won't take the password for love nor money
cause: an old phone kept sending the old password = an old mobile was still trying the old password; caps
  lock was on = caps lock, the usual culprit
fix: unlocked it and removed the old phone = unlocked it and booted the old mobile off; unlocked it and
  set a new password = unlocked it and set a fresh password
after: the login worked at once = straight in first go; the mail loaded again = mail's flowing again

item: laptop = LT; desktop = DT
does: will not connect to the remote gateway = can't get on the VPN from home; drops the remote session =
  gets chucked off the VPN every few minutes
cause: the certificate had expired = the cert had gone out of date; the home router blocked it = the home
  router was being a pain
fix: renewed the certificate = sorted a shiny new cert; changed the gateway address = pointed it at the
  other gateway
after: the session held all afternoon = been on all afternoon no bother; the files opened from home =
  files open from home now

item: monitor = MN; projector = PJ
does: shows no picture = just sits there black; flickers all day = flickers like a disco; shows the wrong
  colours = has gone all purple
cause: the cable was damaged = the cable was chewed to bits; the input was set wrongly = it was on the
  wrong input, easily done
fix: replaced the cable = swapped the cable; reset it to the factory settings = did a factory reset
after: the picture was clear = picture's crisp now; it ran for an hour without fault = ran an hour, not a
  flicker

item: laptop = LT; desktop = DT
does: takes ten minutes to start = takes an age to boot; freezes when the spreadsheet opens = freezes
  solid on the big spreadsheet
cause: the disk was nearly full = the disk was full to bursting; too many programs started with it = half
  the world was launching at startup
fix: cleared the disk = had a good clear out of the disk; turned off the extra programs = switched off the
  startup clutter
after: it started in one minute = boots in a minute flat; the spreadsheet opened at once = spreadsheet
  pops right open

item: mailbox = MB
does: does not accept new mail = is bouncing everything; sends every message twice = sends everything
  twice, bless
cause: it had reached its limit = it was stuffed to the gills; a forwarding rule was looping = a rule was
  going round in circles
fix: moved old mail to the archive = shuffled the old stuff to the archive; deleted the rule = binned the
  rule
after: new mail arrived = new mail's landing; a test message came once = test mail came just the once

item: headset = HS; desk phone = PH
does: has no sound in calls = is dead silent on calls; cuts out during meetings = cuts out mid meeting;
  crackles loudly = crackles like a bonfire
cause: the wrong speaker was chosen = it was set to the wrong speaker; the battery was worn = the
  battery's knackered
fix: chose the right speaker = flipped it to the right speaker; gave out a new one = handed over a new one
after: a test call was clear = test call clear as a bell; both sides could hear = both ends can hear now

item: shared folder = SF
does: cannot be opened = won't let anyone in; has lost last week's files = seems to have eaten last week's
  files
cause: the group rights were missing = somebody fell out of the access group; the files had been moved by
  mistake = the files got dragged somewhere daft
fix: added the group again = popped them back in the group; restored the files from the backup = fished
  the files out of backup
after: all the files were there = everything's back where it should be; the folder opened = opens up fine
  now

item: tablet = TB; handheld scanner = SC
does: will not charge = refuses to charge; turns itself off = keeps conking out; has a cracked screen =
  took a tumble and the screen's gone
cause: the charging port was full of dust = the port was full of fluff; it had been dropped = it met the
  floor at speed
fix: cleaned the port = gave the port a good clean; sent it for repair and lent another = packed it off
  for repair and lent a spare
after: the battery reached full = up to full charge; the loan device works = the spare's doing grand

item: web camera = WC; meeting screen = MS
does: is not seen by the meeting program = doesn't show up in meetings; shows a frozen picture = freezes
  on a very silly face
cause: another program was holding it = something else had nabbed it; the privacy setting was on = the
  privacy switch was on, whoops
fix: closed the other program = shut the other app; changed the privacy setting = flicked the setting
after: the picture moved smoothly = video's smooth as butter; the next meeting went well = next meeting
  went without a hitch

item: docking station = DS
does: does not charge the laptop = won't charge the laptop; loses the keyboard and mouse = keeps losing
  the keyboard and mouse
cause: the firmware was old = the firmware was from the dark ages; the power supply had failed = the power
  brick had died
fix: updated the firmware = gave it new firmware; replaced the power supply = found another power brick
after: everything came back on = everything lit back up; it charged to full = charging nicely

item: design program = DP; accounts program = AP; map program = MP
does: asks for a licence = moans about a licence; closes when saving = falls over on every save; will not
  install = flat out refuses to install
cause: the licence had run out = the licence lapsed on us; a file was damaged = one file was mangled
fix: renewed the licence = renewed the licence, paperwork and all; installed it again = wiped it and
  reinstalled
after: saving worked = saves like a dream; the program opened = opens first time

item: laptop = LT; mobile phone = MO
does: opened a false invoice message = had a click on a dodgy invoice mail; shows strange pop-ups = is
  throwing up weird pop-ups
cause: the message was a phishing attempt = it was phishing, and a sneaky one; an unwanted add-on was
  installed = a naughty add-on had snuck in
fix: reset the password and scanned the disk = changed the password and gave it a full scan; removed the
  add-on = kicked the add-on out
after: the scan found nothing else = scan came back clean; no data had left = nothing leaked, phew

item: door card = DC; login card = LC
does: is not read at the gate = gets a red light at the gate; stopped working on Monday = gave up the
  ghost on Monday
cause: the chip was worn = the chip's worn out; the card had been switched off in error = it got switched
  off by mistake
fix: printed a new card = printed a new one; switched the card on again = flipped it back on
after: the gate opened = green light all the way; the card worked on three doors = three doors tested, all
  good

item: calendar = CA
does: shows meetings at the wrong hour = has everything an hour out; does not reach the phone = isn't
  getting to the mobile
cause: the time zone was wrong = it thought it was abroad; the sync had stopped = sync had gone on strike
fix: set the time zone = put the time zone right; started the sync again = gave the sync a shove
after: the meetings were right = meetings all line up; new entries appeared within a minute = new bits
  show up in seconds
"""

# why: reason for the stay; now: how things stand; kit: a line or a machine; drugs; task: what is still to do.
_STAYS = """
why: a broken hip = a broken hip after a fall at home
now: walks a few steps with a frame = is managing a few steps with the frame and two of us; has pain when
  turning = finds turning in bed rather painful
kit: the wound drain has been removed = the wound drain came out without any trouble; the dressing is dry
  = the hip dressing is dry and intact
drugs: enoxaparin; paracetamol; oxycodone; senna
task: physiotherapy in the morning = make sure physiotherapy see {him} in the morning; a check of the
  heels = look at both heels at every turn

why: a stroke = a stroke affecting the left side
now: speaks in short sentences = is finding a few more words each day; needs help to eat = needs somebody
  to sit with {him} at meals
kit: the feeding tube is in place = the feeding tube is in a good position; the heart monitor is on = the
  heart monitor has been quiet
drugs: clopidogrel; atorvastatin; aspirin; amlodipine
task: a swallowing test = chase the swallowing assessment; a scan of the neck vessels = check the time of
  the neck scan

why: pneumonia = pneumonia on the right side
now: breathes more easily = is breathing far more comfortably; coughs up green phlegm = is still bringing
  up green phlegm
kit: oxygen runs at two litres = oxygen is running at two litres through the nose; the drip is in the left
  arm = the drip in the left arm looks healthy
drugs: amoxicillin; clarithromycin; doxycycline; paracetamol
task: a chest film = send {him} for the chest film; a try without oxygen = try {him} without oxygen after
  breakfast

why: a blood infection = an infection in the blood
now: has had no fever today = has been free of fever since noon; is tired but alert = is weary but knows
  where {she} is
kit: the central line is clean = the central line site is clean; the catheter drains well = the catheter
  is draining well
drugs: gentamicin; vancomycin; ceftriaxone; metronidazole
task: blood cultures = follow up the blood cultures; a drug level at noon = take the drug level before
  noon

why: bowel surgery = an operation on the bowel
now: drinks clear fluids = is taking clear fluids without feeling sick; has passed wind = has passed wind,
  to everybody's delight
kit: the stoma is pink = the stoma is pink and working; the stomach tube is on free drainage = the stomach
  tube is on free drainage
drugs: metronidazole; morphine; ondansetron; enoxaparin
task: a visit by the stoma nurse = ask the stoma nurse to visit; a record of all fluids = keep a strict
  fluid chart

why: a new knee = a planned knee replacement
now: bends the knee well = is bending the knee beautifully; walks to the door = has walked to the door and
  back
kit: the ice cuff is in use = the ice cuff is helping; the dressing is dry = the knee dressing is dry and
  intact
drugs: rivaroxaban; paracetamol; tramadol; naproxen
task: practice on the stairs = practise the stairs with {him}; a film of the knee = see that the knee film
  is done

why: a heart attack = a heart attack on Sunday
now: has had no more chest pain = has had no further chest pain; is anxious about going home = is worried
  about going home
kit: the heart monitor is on = the heart monitor has been quiet; the wrist band is off = the wrist band
  came off without bleeding
drugs: aspirin; clopidogrel; bisoprolol; ramipril
task: a scan of the heart = check when the heart scan is booked; a talk with the heart nurse = ask the
  heart nurse to come by

why: kidney failure = kidneys that suddenly failed
now: passes more urine = is passing more urine than yesterday; feels less sick = feels much less sick
kit: the catheter drains well = the catheter is draining well; the drip runs slowly = the drip is running
  at the slow rate
drugs: furosemide; pantoprazole; cyclizine
task: kidney blood tests at six = take the kidney bloods at six; a weight before breakfast = weigh {him}
  before breakfast

why: high blood sugar = dangerously high blood sugar
now: eats half of each meal = is eating about half of each meal; feels thirsty = still complains of thirst
kit: the insulin pump is running = the insulin pump is running to the chart; the drip is in the right arm
  = the drip in the right arm looks healthy
drugs: insulin glargine; metformin; omeprazole
task: a sugar reading every hour = check the sugar every hour; a visit by the diabetes nurse = ask the
  diabetes nurse to teach {him}

why: a head injury = a fall with a knock to the head
now: knows the day and the place = knows the day and the place; has a mild headache = still has a mild
  headache
kit: the stitches are clean = the stitches are clean and dry; the neck collar is off = the neck collar has
  come off
drugs: paracetamol; codeine; ondansetron; levetiracetam
task: checks of the pupils = check the pupils every two hours; a second scan = ring to confirm the second
  scan

why: seizures = two seizures at home
now: has had no seizure since = has had no further seizure; sleeps a great deal = has been very sleepy
kit: the bed rails are padded = the bed rails are padded and up; the drip is in the left arm = the drip in
  the left arm looks healthy
drugs: levetiracetam; phenytoin; folic acid
task: a tracing of the brain = see that the brain tracing is booked; a drug level at noon = take the drug
  level before noon

why: bleeding from the stomach = bleeding from a stomach ulcer
now: has had no more dark stools = has had no more dark stools; looks less pale = has more colour in {her}
  face
kit: a second unit of blood is running = the second unit of blood is running without reaction; two drips
  are in place = both drips look healthy
drugs: pantoprazole; paracetamol; ferrous sulfate
task: a blood count at ten = repeat the blood count at ten; nothing to eat before the camera test = keep
  {him} fasted for the camera test

why: an inflamed pancreas = an inflamed pancreas
now: has less pain = is in far less pain; drinks small sips = is taking small sips
kit: the pain pump is in use = the pain pump is being used sensibly; the drip runs fast = the drip is
  running at the fast rate
drugs: morphine; thiamine; cyclizine; paracetamol
task: a scan of the belly = send {him} for the belly scan; a record of all fluids = keep a strict fluid
  chart

why: appendix surgery = an operation for the appendix
now: gets up alone = is up and about alone; eats toast = managed tea and toast
kit: the three small wounds are clean = the three small wounds are clean; the drip has been removed = the
  drip came out this morning
drugs: metronidazole; paracetamol; ibuprofen; ondansetron
task: papers for going home = get the papers for going home signed; advice on lifting = explain about
  lifting

why: confusion = sudden confusion, worse in the evening
now: wanders at night = was wandering around two in the morning; is calm with company = settles when
  somebody sits with {him}
kit: the fall alarm is on = the fall alarm is under the cushion; the hearing aids are in = the hearing
  aids are in and working
drugs: haloperidol; melatonin; lactulose; thiamine
task: a urine sample = send off a urine sample; a talk with the family = speak with the family about home

why: a leg ulcer = a leg ulcer that would not heal
now: has less pain in the leg = says the leg is less sore; sits out for meals = is sitting out for meals
kit: the vacuum dressing holds = the vacuum dressing is holding its seal; the special mattress is working
  = the special mattress is working
drugs: flucloxacillin; codeine; furosemide
task: a new dressing tomorrow = change the dressing tomorrow; a photograph of the wound = photograph the
  wound

why: a clot in the leg = a clot in the right leg
now: has less swelling = has much less swelling; walks to the bathroom = is walking to the bathroom alone
kit: the stocking is on the other leg = the stocking is on the other leg only; the infusion pump is
  running = the infusion pump is running well
drugs: apixaban; warfarin; enoxaparin; rivaroxaban
task: a clotting test at six = take the clotting test at six; a visit by the pharmacist = ask the
  pharmacist to counsel {him}
"""


def _cases(table: str) -> tuple[_Case, ...]:
    """Parse one of the tables above: blocks parted by a blank line, ``field: plain = house; ...``."""
    cases: list[_Case] = []
    for block in table.strip().split("\n\n"):
        fields: dict[str, str] = {}
        field = ""
        for line in block.split("\n"):
            if not line.startswith("  "):  # an indented line goes on with the field above
                field, _, line = line.partition(":")
            fields[field] = f"{fields.get(field, '')} {line.strip()}"
        case: dict[str, tuple[_Said, ...]] = {}
        for field, entries in fields.items():
            pairs = (entry.partition("=") for entry in entries.split(";"))
            case[field] = tuple((left.strip(), (right or left).strip()) for left, _, right in pairs)
        cases.append(case)
    return tuple(cases)


def _drugs(table: str) -> Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Parse the drug table to ``{name: (doses, how often)}``."""
    rows = (line.split("|") for line in table.strip().split("\n"))
    return {
        name.strip(): (tuple(d.strip() for d in doses.split(",")), tuple(h.strip() for h in how.split(",")))
        for name, doses, how in rows
    }


_ILLNESS_CASES, _FAULT_CASES, _STAY_CASES = _cases(_ILLNESSES), _cases(_FAULTS), _cases(_STAYS)
_DRUGS = _drugs(_DRUG_TABLE)


# --------------------------------------------------------------------------------------------------
# Drawing facts
# --------------------------------------------------------------------------------------------------


class _Draw:
    """Random draws that use ``Random.random`` alone, for the reason given at the top."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed).random

    def number(self, low: int, high: int) -> int:
        """Return an integer from `low` to `high`, both included."""
        return low + int(self._random() * (high - low + 1))

    def pick(self, items: Sequence[_T]) -> _T:
        """Return one of the items."""
        return items[self.number(0, len(items) - 1)]

    def two(self, items: Sequence[_T]) -> tuple[_T, _T]:
        """Return two different items (the same one twice when there is only one)."""
        first = self.number(0, len(items) - 1)
        second = (first + self.number(1, max(1, len(items) - 1))) % len(items)
        return items[first], items[second]

    def chance(self, share: float) -> bool:
        """Return True in this share of draws."""
        return self._random() < share

    def digits(self, count: int) -> str:
        """Return a string of decimal digits, the first not zero."""
        return str(self.number(10 ** (count - 1), 10**count - 1))

    def name(self, woman: bool) -> tuple[str, str]:
        """Return a first name and surname."""
        return self.pick(_WOMEN if woman else _MEN), self.pick(_SURNAMES)

    def phone(self) -> str:
        """Return a telephone number from a range kept for fiction."""
        return f"{self.pick(_PHONE_RANGES)}{self.number(0, 999):03d}"

    def drug(self, names: tuple[_Said, ...]) -> tuple[str, str, str]:
        """Return name, dose and frequency of one of the drugs named."""
        name = self.pick(names)[0]
        doses, how = _DRUGS[name]
        return name, self.pick(doses), self.pick(how)


class _Facts:
    """Slots for the sentence templates of one note, and the private strings among them.

    Slots with a capital begin a sentence. `private` keeps every value that identifies somebody; those
    that a note really uses become its `Note.secrets`.
    """

    def __init__(self, draw: _Draw) -> None:
        self.draw = draw
        self.slots: dict[str, str] = {}
        self.private: list[str] = []
        woman = draw.chance(0.5)
        self.slots.update(
            zip(("she", "her", "him", "woman"), ("she", "her", "her", "woman"), strict=True)
            if woman
            else zip(("she", "her", "him", "woman"), ("he", "his", "him", "man"), strict=True)
        )
        self.slots.update(She=self.slots["she"].title(), Her=self.slots["her"].title())
        self.slots.update(sex="F" if woman else "M", title="Mrs" if woman else "Mr")
        self.slots.update(lady="lady" if woman else "gentleman")
        first, last = draw.name(woman)
        self.hide(name=f"{first} {last}", filed=f"{last}, {first}", first=first, last=last)
        year, month, day = draw.number(2021, 2026), draw.number(1, 12), draw.number(1, 28)
        short_month = _MONTHS[month - 1][:3]
        self.hide(
            date=f"{day} {_MONTHS[month - 1]} {year}",
            slashed=f"{day:02d}/{month:02d}/{year % 100}",
            dotted=f"{day:02d}.{month:02d}.{year}",
            chatty=f"{draw.pick(_DAYS)} {day} {short_month}",
            phone=draw.phone(),
        )
        staff_first, staff_last = draw.name(draw.chance(0.5))
        self.hide(staff=f"{staff_first} {staff_last}", staff_first=staff_first, staff_last=staff_last)

    def hide(self, **values: str) -> None:
        """Add slots whose values identify somebody."""
        self.slots.update(values)
        self.private.extend(values.values())

    def both(self, slot: str, said: _Said) -> None:
        """Add `slot` in plain words and ``slot_house`` in house words, and the same with a capital."""
        for name, words in ((slot, said[0]), (f"{slot}_house", said[1])):
            words = words.format(**self.slots)
            self.slots[name] = words
            self.slots[name[0].upper() + name[1:]] = words[0].upper() + words[1:]

    def medicine(self, slot: str, names: tuple[_Said, ...]) -> None:
        """Add a drug with its dose, in plain words and in prescriber's shorthand."""
        name, dose, how = self.draw.drug(names)
        self.both(slot, (f"{name} {dose} {_HOW_OFTEN[how]}", f"{name} {dose.replace(' ', '')} {how}"))
        self.slots[f"{slot}_name"] = name

    def age(self, low: int, high: int) -> None:
        """Add an age in years, and the article before it: "an" 80 year old, "a" 70 year old."""
        age = self.draw.number(low, high)
        article = "an" if age in (8, 11, 18) or 80 <= age < 90 else "a"
        self.slots.update(age=str(age), an=article, An=article.title())

    def say(self, *templates: str) -> str:
        """Return one of the templates, filled in."""
        return self.draw.pick(templates).format(**self.slots)


def _clinic_facts(draw: _Draw) -> _Facts:
    facts = _Facts(draw)
    case, before = draw.two(_ILLNESS_CASES)
    facts.age(19, 92)
    facts.hide(record=f"{draw.digits(3)}-{draw.digits(4)}")
    for slot, field in (("said", "said"), ("told", "told"), ("dx", "name")):
        facts.both(slot, draw.pick(case[field]))
    for slots, field in ((("found", "also"), "found"), (("test", "test2"), "tests")):
        for slot, said in zip(slots, draw.two(case[field]), strict=True):
            facts.both(slot, said)
    facts.both("before", before["name"][0])
    facts.medicine("usual", before["drugs"])
    facts.medicine("drug", case["drugs"])
    facts.both("span", draw.pick(_SPANS))
    facts.both("review", draw.pick(_REVIEWS))
    facts.slots.update(
        bp=f"{draw.number(104, 178)}/{draw.number(58, 98)}",
        pulse=str(draw.number(56, 118)),
        temp=f"{draw.number(36, 38)}.{draw.number(0, 9)}",
        sats=str(draw.number(92, 99)),
    )
    return facts


def _desk_facts(draw: _Draw) -> _Facts:
    facts = _Facts(draw)
    case = draw.pick(_FAULT_CASES)
    item, letters = draw.pick(case["item"])
    facts.slots.update(item=item, team=draw.pick(_DEPARTMENTS))
    facts.hide(ticket=f"INC{draw.digits(5)}", asset=f"{letters}-{draw.digits(4)}")
    for field in ("does", "after"):
        facts.both(field, draw.pick(case[field]))
    # Each cause has its own remedy.
    cause, fix = draw.pick(tuple(zip(case["cause"], case["fix"], strict=True)))
    facts.both("cause", cause)
    facts.both("fix", fix)
    return facts


def _ward_facts(draw: _Draw) -> _Facts:
    facts = _Facts(draw)
    case = draw.pick(_STAY_CASES)
    facts.age(24, 97)
    relation, woman = draw.pick(_RELATIONS)
    relative_first, _ = draw.name(woman)
    facts.hide(record=f"H{draw.digits(6)}", relative=f"{relative_first} {facts.slots['last']}")
    facts.slots.update(
        ward=draw.pick(_WARDS),
        bed=str(draw.number(1, 28)),
        relation=relation,
        bp=f"{draw.number(100, 168)} over {draw.number(56, 94)}",
        pulse=str(draw.number(58, 112)),
        sats=str(draw.number(91, 99)),
    )
    for field in ("why", "kit"):
        facts.both(field, draw.pick(case[field]))
    for slots, field in ((("now", "now2"), "now"), (("task", "task2"), "task")):
        for slot, said in zip(slots, draw.two(case[field]), strict=True):
            facts.both(slot, said)
    facts.medicine("drug", case["drugs"])
    return facts


# --------------------------------------------------------------------------------------------------
# Styles
# --------------------------------------------------------------------------------------------------


def _plain_clinic(f: _Facts) -> str:
    text = [
        f.say(
            "{name}, aged {age}, came to the clinic on {date} with {said} for {span}.",
            "On {date} Dr {staff_last} saw {name}, {an} {age} year old {woman}, about {said} for {span}.",
            "{name} is {age} and was seen on {date} because of {said}, which began {span} ago.",
            "{name}, {an} {age} year old {woman}, told Dr {staff_last} on {date} of {said} for {span}.",
        ),
        f.say(
            "On examination {found} and {also}.",
            "{Found}, and {also}. The pulse was {pulse}.",
            "The blood pressure was {bp} and {found}.",
            "The pulse was {pulse} and the temperature {temp}. {Found}, but {also}.",
        ),
        f.say(
            "The likely cause is {dx}.", "This was thought to be {dx}.", "The doctor's opinion was {dx}.",
            "The findings fit with {dx}.",
        ),
        f.say(
            "{She} was given {drug}, and {test} will be arranged.",
            "The plan is {drug} and {test}.",
            "Dr {staff_last} prescribed {drug} and asked for {test} and {test2}.",
            "{Test} will be done, and {she} will take {drug}.",
        ),
    ]  # fmt: skip
    extra = f.draw.number(0, 2)
    if extra == 1:
        text.insert(1, f.say("{She} already takes {usual} for {before}.", "{Her} history includes {before}."))
    elif extra == 2:
        text.append(f.say("{She} was told {told}.", "{She} was advised {told}, and will be seen again {review}."))
    text.append(
        f.say(
            "{Her} record number is {record} and {her} telephone number is {phone}.",
            "The record number is {record}. The clinic can reach {him} on {phone}.",
            "{She} can be called on {phone}, record number {record}.",
        )
    )
    return " ".join(text)


def _plain_desk(f: _Facts) -> str:
    text = [
        f.say(
            "{name} in {team} reported on {date} that {her} {item} {does}.",
            "On {date} {name} from {team} wrote that {her} {item} {does}.",
            "{name}, who works in {team}, called the service desk on {date} because {her} {item} {does}.",
        ),
        f.say(
            "The asset tag is {asset} and the request has the number {ticket}.",
            "The request was filed as {ticket} for asset {asset}.",
            "Request {ticket} was opened for the {item} with the tag {asset}.",
        ),
        f.say(
            "{staff} looked into it and found that {cause}.",
            "The reason was that {cause}.",
            "A check showed that {cause}.",
        ),
        f.say(
            "{staff} {fix}, and {after}.",
            "The service desk {fix}. After that {after}.",
            "To solve this, {staff} {fix}. {After}.",
        ),
        f.say(
            "{name} can be reached on {phone}.", "{Her} telephone number is {phone}.",
            "The service desk will call {him} on {phone} to close the request.",
        ),
    ]  # fmt: skip
    if f.draw.chance(0.4):
        text.append(
            f.say(
                "{She} was content with the result.",
                "The request was then closed.",
                "{She} had no other faults.",
            )
        )
    return " ".join(text)


def _plain_ward(f: _Facts) -> str:
    text = [
        f.say(
            "{name}, aged {age}, was admitted to {ward} ward on {date} with {why}.",
            "{name} is {an} {age} year old {woman} who came to {ward} ward on {date} because of {why}.",
            "{An} {age} year old {woman}, {name}, has been on {ward} ward since {date} with {why}.",
        ),
        f.say(
            "{She} is in bed {bed}, hospital number {record}.",
            "The hospital number is {record} and the bed is {bed}.",
            "{Her} hospital number is {record}.",
        ),
        f.say("{She} {now}.", "{She} {now} and {now2}.", "Today {she} {now}."),
        f.say(
            "The blood pressure is {bp} and the pulse {pulse}.",
            "{Kit}. The pulse is {pulse} and the oxygen level {sats} percent.",
            "{Kit}, and the blood pressure is {bp}.",
        ),
        f.say(
            "{She} takes {drug}.", "{She} was given {drug}.", "The doctor, {staff}, has ordered {drug}.",
        ),
        f.say("Still to do are {task} and {task2}.", "The next step is {task}.", "The plan is {task}."),
        f.say(
            "{Her} {relation}, {relative}, can be called on {phone}.",
            "The family contact is {relative}, {her} {relation}, on {phone}.",
        ),
    ]  # fmt: skip
    return " ".join(text)


def _house_clinic(f: _Facts) -> str:
    text = [
        f.say(
            "CLN {slashed} | {filed} {age}{sex} | MRN {record}",
            "{slashed} // {filed}, {age}{sex} // MRN {record}",
        ),
        f.say("PC: {said_house} x{span_house}.", "c/o {said_house}, {span_house} hx."),
        f.say("PMHx: {before_house}. NKDA.", "PMHx: nil. NKDA."),
        f.say(
            "O/E: {found_house}, {also_house}.",
            "O/E: {found_house}. BP {bp}, HR {pulse}, SpO2 {sats}% RA.",
            "O/E: {also_house}. T {temp}, HR {pulse} reg.",
        ),
        f.say("Imp: {dx_house}.", "Imp: likely {dx_house}.", "Imp: {dx_house}, ddx d/w pt."),
        f.say("Rx {drug_house}. Ix: {test_house}.", "Ix: {test_house}. Rx {drug_house}."),
        f.say("Adv: {told_house}. R/v {review_house}.", "Plan: {told_house}; TCI r/v {review_house}, sos."),
        f.say("Tel {phone}. Dr {staff_last} /cln", "T: {phone} -- {staff_last}/GP"),
    ]
    return "\n".join((text[0], " ".join(text[1:3]), text[3], " ".join(text[4:7]), text[7]))


def _house_desk(f: _Facts) -> str:
    text = [
        f.say("Hiya team! {ticket} for you.", "Morning all, {ticket} here :)", "Hey folks, quick one, {ticket}!"),
        f.say(
            "{name} down in {team} shouted on {chatty}, {her} {item} ({asset}) {does_house}, poor thing.",
            "So on {chatty} {name} from {team} was on the blower, {her} {item} {does_house} ({asset}).",
            "Got a ping from {name} in {team} on {chatty}: {her} {item}, {asset}, {does_house}. Classic!",
        ),
        f.say(
            "Had a nosey and, yep, {cause_house}.",
            "Long story short, {cause_house}.",
            "Bit of digging later... {cause_house}!",
        ),
        f.say(
            "So I {fix_house} and {after_house} :)",
            "I {fix_house}, fingers crossed, but {after_house}.",
            "Anyway, {fix_house}. {After_house}, happy days!",
        ),
        f.say(
            "I'll give {first} a bell on {phone} tomorrow.",
            "If it plays up again, {first}'s on {phone}.",
            "{first} says ta, ring {him} on {phone} first.",
        ),
        f.say("Cheers, {staff_first} x", "Ta muchly, {staff_first}", "Laters! {staff_first} @ the desk"),
    ]
    return " ".join(text)


def _house_ward(f: _Facts) -> str:
    text = [
        f.say(
            "Good evening, colleagues.",
            "Good morning from {ward} ward.",
            "Thank you for gathering.",
        ),
        f.say(
            "In bed {bed} we have {title} {name}, a lovely {lady} of {age}, with us following {why_house}.",
            "Our next {lady} is {title} {name}, {age} years young, with us following {why_house}.",
        ),
        f.say(
            "The wristband reads {record}, dated {dotted}.",
            "Kindly note the wristband, {record} of {dotted}.",
        ),
        f.say(
            "I can report that {title} {last} {now_house}.",
            "Through my shift {title} {last} {now_house}.",
        ),
        f.say(
            "You will find that {kit_house}.",
            "I have signed for {drug_name}.",
            "{Her} {drug_name} has been given with my signature.",
        ),
        f.say("Would you be so kind as to {task_house}?", "May I ask the oncoming team to {task_house}?"),
        f.say(
            "{Her} {relation} {relative} is grateful for news, {phone}.",
            "Do please telephone {her} {relation} {relative}, {phone}.",
        ),
        f.say("With warm thanks, Sister {staff_last}.", "I leave {him} in your good hands. Nurse {staff_last}."),
    ]
    return " ".join(text)


_FACTS = {"clinic": _clinic_facts, "desk": _desk_facts, "ward": _ward_facts}
_PLAIN_STYLE = {"clinic": _plain_clinic, "desk": _plain_desk, "ward": _plain_ward}
_HOUSE_STYLE = {"clinic": _house_clinic, "desk": _house_desk, "ward": _house_ward}


def _note(site: str, draw: _Draw) -> Note:
    """Return one note of a site, or a plain one about any of the three subject matters."""
    subject = draw.pick(SITES) if site == PLAIN else site
    facts = _FACTS[subject](draw)
    text = (_PLAIN_STYLE if site == PLAIN else _HOUSE_STYLE)[subject](facts)
    return Note(site, text, _planted(facts.private, text))


def _planted(private: Sequence[str], text: str) -> tuple[str, ...]:
    """Return the private strings in `text` that stand there as words, outside every longer one of them."""
    found: set[str] = set()
    for value in sorted(private, key=len, reverse=True):
        start = text.find(value)
        while start >= 0:
            end = start + len(value)
            if not text[start - 1 : start].isalnum() and not text[end : end + 1].isalnum():
                found.add(value)
                text = f"{text[:start]}#{text[end:]}"  # hidden from the shorter values still to come
            start = text.find(value, start + 1)
    return tuple(value for value in dict.fromkeys(private) if value in found)


def notes(site: str, count: int, seed: int) -> list[Note]:
    """Return `count` notes of a site (one of `SITES`, or `PLAIN`).

    The first notes do not depend on `count`: asking for more only adds to the end. Different seeds give
    unrelated notes. An unknown site or a negative count raises ValueError.
    """
    if site not in (*SITES, PLAIN):
        raise ValueError(f"unknown site {site!r}; the sites are {', '.join((*SITES, PLAIN))}")
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    draw = _Draw(f"{site}/{seed}")
    return [_note(site, draw) for _ in range(count)]


def pretraining(count: int, seed: int) -> list[Note]:
    """Return `count` notes for a base model: plain ones and a share of `HOUSE_SHARE` from the sites."""
    draw = _Draw(f"pretraining/{seed}")
    return [_note(draw.pick(SITES) if draw.chance(HOUSE_SHARE) else PLAIN, draw) for _ in range(count)]
